"""API keys: the file, changes of it, and which keys are accepted."""

import hmac
import logging
import os
import socket
from pathlib import Path

import pytest
import redis.asyncio

from server.admission import keys
from server.admission.keys import (
    API_KEY_CALLER,
    Caller,
    KeyFileError,
    KeyRing,
    hash_key,
    key_table,
    new_key,
    parse_key_file,
)
from server.processes.launch import _warn_if_open
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_cli import glimmer
from tests.server.test_errors import error_of

URL = "/v1/images/generations"


def table(name: str, key: str, **limits: int) -> str:
    lines = (f"{limit} = {value}" for limit, value in limits.items())
    return "\n".join((f"[{name}]", f'sha256 = "{hash_key(key).hex()}"', *lines, ""))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class TestFile:
    def test_callers_and_their_limits(self) -> None:
        text = table("alice", "a") + table(
            "Bob-2_", "b", max_concurrent=1, requests_per_minute=2, pixel_steps_per_day=3
        )
        assert parse_key_file(text) == {hash_key("a"): Caller("alice"), hash_key("b"): Caller("Bob-2_", 1, 2, 3)}
        assert parse_key_file("") == {}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[alice", "not valid TOML"),
            (table("alice", "a") + table("alice", "b"), "not valid TOML"),
            (table("alice", "a") + table("bob", "a"), r"\[bob\] has the same key as \[alice\]"),
            (table('"al ice"', "a"), r"\[al ice\]: a name has 1..64 letters"),
            (table('"--api-key"', "a"), "a name has"),
            (table("a" * 65, "a"), "a name has"),
            ("alice = 1", r"\[alice\] must be a table of sha256, max_concurrent"),
            ("[alice]", r"sha256 of \[alice\] must be the 64"),
            ("[alice]\nsha256 = 'abc'", r"sha256 of \[alice\] must be the 64"),
            (table("alice", "a").upper().replace("SHA256", "sha256"), r"sha256 of \[ALICE\]"),
            (table("alice", "a") + "limit = 1", r"\[alice\] must be a table of"),
            (table("alice", "a", max_concurrent=0), r"max_concurrent of \[alice\] must be a whole number above 0"),
            (table("alice", "a") + "max_concurrent = 1.5", "max_concurrent of"),
            (table("alice", "a") + "max_concurrent = true", "max_concurrent of"),
            (table("alice", "a", requests_per_minute=100_001), "requests_per_minute of .* 1..100000"),
            (table("alice", "a", pixel_steps_per_day=2**53), "pixel_steps_per_day of"),
        ],
    )
    def test_mistakes_are_named_and_hashes_are_not(self, text: str, message: str) -> None:
        with pytest.raises(KeyFileError, match=message) as caught:
            parse_key_file(text)
        assert hash_key("a").hex() not in str(caught.value)

    def test_a_new_key_matches_its_table(self) -> None:
        first, second = new_key(), new_key()
        assert first != second
        assert parse_key_file(key_table("alice", first) + key_table("bob", second)) == {
            hash_key(first): Caller("alice"),
            hash_key(second): Caller("bob"),
        }
        assert first not in key_table("alice", first)

    @pytest.mark.parametrize("content", [None, b"\xff", b"[alice"])
    def test_an_invalid_file_prevents_the_start(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "keys.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(KeyFileError, match=r"keys\.toml"):
            KeyRing(ServerSettings(api_keys_file=path))
        started = glimmer("api", "--redis-url", "unix:///nowhere", "--port", "0", "--api-keys", str(path))
        assert started.exit_code == 2
        assert str(path) in started.output


class TestRing:
    @pytest.fixture(autouse=True)
    def _check_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "POLL_INTERVAL_S", 0.0)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "keys.toml"
        path.write_text(table("alice", "a"))
        return path

    def test_a_change_takes_effect(self, path: Path) -> None:
        ring = KeyRing(ServerSettings(api_keys_file=path))
        assert (ring.find("a"), ring.find("b")) == (Caller("alice"), None)
        path.write_text(table("bob", "b", max_concurrent=3))
        assert (ring.find("a"), ring.find("b")) == (None, Caller("bob", 3))
        path.write_text("")
        assert ring.find("b") is None
        assert not ring.open_to_all  # a file without keys accepts no key

    def test_an_invalid_change_is_logged_once_and_ignored(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        ring = KeyRing(ServerSettings(api_keys_file=path))
        path.write_text("[alice")
        assert [ring.find("a") for _ in range(3)] == [Caller("alice")] * 3
        path.unlink()
        assert [ring.find("a") for _ in range(3)] == [Caller("alice")] * 3
        assert [record.getMessage().split()[0] for record in caplog.records] == ["keys_not_read"] * 2
        path.write_text(table("alice", "new"))
        assert (ring.find("a"), ring.find("new")) == (None, Caller("alice"))

    def test_a_file_that_has_not_changed_is_not_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ring = KeyRing(ServerSettings(api_keys_file=path))
        monkeypatch.setattr(keys, "_read", lambda _: pytest.fail("it was read"))
        assert ring.find("a") == Caller("alice")

    def test_the_file_is_checked_rarely(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "POLL_INTERVAL_S", 60.0)
        ring = KeyRing(ServerSettings(api_keys_file=path))
        path.write_text("")
        assert ring.find("a") == Caller("alice")

    def test_every_hash_is_compared(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_text(table("alice", "a") + table("bob", "b"))
        ring = KeyRing(ServerSettings(api_key="one", api_keys_file=path))  # type: ignore[arg-type]
        compared = 0
        compare = hmac.compare_digest

        def counted(a: bytes, b: bytes) -> bool:
            nonlocal compared
            compared += 1
            return compare(a, b)

        monkeypatch.setattr(hmac, "compare_digest", counted)
        for key, caller in (("one", API_KEY_CALLER), ("a", Caller("alice")), ("b", Caller("bob")), ("c", None)):
            compared = 0
            assert ring.find(key) == caller
            assert compared == 3


async def test_keys_of_the_file_and_the_single_key_are_accepted(
    make_client: MakeClient, stub: StubEngine, queue: JobQueue, redis_client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "a") + table("bob", "b"))
    owners = []
    async with make_client(api_key="one", api_keys_file=path) as client:
        for key in ("one", "a", "b"):
            assert (await client.post(URL, json={"prompt": "x"}, headers=bearer(key))).status_code == 200
            (job,) = await redis_client.keys("glimmer:job:*")
            assert isinstance(job, bytes)
            record = await queue.get(job.decode().removeprefix("glimmer:job:"))
            assert record is not None
            owners.append(record.owner)
            await redis_client.delete(job)
        for headers in ({}, bearer("c"), bearer(""), bearer(hash_key("a").hex())):
            response = await client.get("/v1/models", headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert "security" in paths[URL]["post"]
    assert owners == ["--api-key", "alice", "bob"]


async def test_the_log_contains_the_owner_and_not_the_key(
    make_client: MakeClient, stub: StubEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "glm-secret"))
    async with make_client(api_keys_file=path) as client:
        await client.get("/v1/models", headers=bearer("glm-secret"))
        await client.get("/v1/models", headers=bearer("glm-wrong"))
    lines = [record.getMessage() for record in caplog.records if record.name == "glimmer.http"]
    assert [line.rpartition(" ")[2] == "key=alice" for line in lines] == [True, False]
    assert not any("glm-" in line for line in lines)


@pytest.mark.parametrize(
    ("host", "settings", "warned"),
    [
        ("127.0.0.1", {}, False),
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"api_key": "k"}, False),
        ("0.0.0.0", {"api_keys_file": os.devnull}, False),
    ],
)
def test_a_server_without_keys_warns_about_it(
    host: str, settings: dict[str, str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server((host, 0)) as listener:
        _warn_if_open(ServerSettings(**settings), listener)  # type: ignore[arg-type]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned


class TestCommand:
    def test_the_key_and_its_table_are_printed_separately(self) -> None:
        made = glimmer("key", "alice")
        assert made.exit_code == 0, made.output
        (key,) = (word for word in made.stderr.split() if word.startswith("glm-"))
        assert parse_key_file(made.stdout) == {hash_key(key): Caller("alice")}
        assert "glm-" not in made.stdout

    @pytest.mark.parametrize("name", ["", "al ice", "-x", "a.b", "ä"])
    def test_invalid_names(self, name: str) -> None:
        refused = glimmer("key", "--", name)
        assert refused.exit_code == 2
        assert "letters, digits" in refused.output
