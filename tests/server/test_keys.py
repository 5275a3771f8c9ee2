"""API keys: the file, changes of it, and which keys are accepted."""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission import keys
from server.admission.keys import (
    API_KEY_CALLER,
    CUT_OFF_S,
    SETTLE_S,
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
from tests.waiting import until

URL = "/v1/images/generations"


def table(name: str, key: str, **limits: int) -> str:
    lines = (f"{limit} = {value}" for limit, value in limits.items())
    return "\n".join((f"[{name}]", f'sha256 = "{hash_key(key).hex()}"', *lines, ""))


ALL_LIMITS = {"max_concurrent": 9, "requests_per_minute": 9, "pixel_steps_per_day": 9}


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
            (table("alice", "a") + "max_concurrent = " + "9" * 5000, "not valid TOML"),
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


class Watched:
    """A key ring over a file, with a clock that the test moves."""

    def __init__(self, path: Path):
        self.path, self.now = path, 0.0
        self.ring = KeyRing(ServerSettings(api_keys_file=path), lambda: self.now)

    def owners(self, *tokens: str) -> list[Caller | None]:
        return [self.ring.find(token) for token in tokens]

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.ring.look()
            self.now += 0.5
        self.ring.look()


LIMITS = st.dictionaries(st.sampled_from(["max_concurrent", "requests_per_minute"]), st.integers(1, 5000))
FILES = st.dictionaries(st.sampled_from(["alice", "bob", "carol"]), st.tuples(st.sampled_from("abcdef"), LIMITS))


class TestRing:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "keys.toml"
        path.write_text(table("alice", "a"))
        return path

    def test_a_change_takes_effect(self, path: Path) -> None:
        watched = Watched(path)
        assert watched.owners("a", "b") == [Caller("alice"), None]
        path.write_text(table("alice", "new", max_concurrent=2) + table("bob", "b", **ALL_LIMITS))
        watched.wait(SETTLE_S - 0.5)
        assert watched.owners("a", "b") == [Caller("alice"), None]
        watched.wait(1.0)
        assert watched.owners("a", "new", "b") == [None, Caller("alice", 2), Caller("bob", **ALL_LIMITS)]

    def test_keys_that_are_gone_are_refused_after_ten_seconds(self, path: Path) -> None:
        watched = Watched(path)
        path.write_text(table("bob", "b", **ALL_LIMITS))
        watched.wait(CUT_OFF_S - 1)
        assert watched.owners("a", "b") == [Caller("alice"), None]
        watched.wait(1.5)
        assert watched.owners("a", "b") == [None, Caller("bob", **ALL_LIMITS)]
        path.write_text("# nobody\n")
        watched.wait(CUT_OFF_S + 1)
        assert watched.owners("a", "b") == [None, None]
        assert not watched.ring.open_to_all  # a file without keys accepts no key

    def test_a_file_that_became_empty_locks_nobody_out(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        watched = Watched(path)
        path.write_text("")
        watched.wait(60)
        assert watched.owners("a") == [Caller("alice")]
        assert [record.getMessage().split()[0] for record in caplog.records] == ["keys_not_read"]

    def test_an_invalid_change_is_logged_once_and_ignored(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        watched = Watched(path)
        path.write_text("[alice")
        watched.wait(60)
        path.unlink()
        watched.wait(60)
        assert watched.owners("a") == [Caller("alice")]
        assert [record.getMessage().split()[0] for record in caplog.records] == ["keys_not_read"] * 2
        path.write_text(table("alice", "new", **ALL_LIMITS))
        watched.wait(SETTLE_S + 0.5)
        assert watched.owners("a", "new") == [None, Caller("alice", **ALL_LIMITS)]

    @given(old=FILES, new=FILES, cut=st.floats(0, 1))
    @settings(max_examples=150, deadline=None)
    def test_a_file_that_is_half_written_changes_nothing_bad(
        self, tmp_path_factory: pytest.TempPathFactory, old: Any, new: Any, cut: float
    ) -> None:
        """Whatever stands there for ten seconds: no old key is refused, and none has fewer limits than it gets in the
        end or had before."""
        before, after = ("".join(table(name, key, **limits) for name, (key, limits) in f.items()) for f in (old, new))
        try:
            final = parse_key_file(after)
            initial = parse_key_file(before)
        except KeyFileError:
            return  # two names with one key
        path = tmp_path_factory.mktemp("keys") / "keys.toml"
        path.write_text(before)
        watched = Watched(path)
        path.write_text(after[: int(cut * len(after))])
        watched.wait(CUT_OFF_S - 1)
        found = {key: watched.ring.find(key) for key in "abcdef"}
        owners = {caller.owner for caller in found.values() if caller}
        assert owners >= {caller.owner for caller in initial.values()}
        for key, caller in found.items():
            assert caller in (None, initial.get(hash_key(key)), final.get(hash_key(key)))
        path.write_text(after + "# the end\n")
        watched.wait(CUT_OFF_S + 1)
        assert [watched.ring.find(key) for key in "abcdef"] == [final.get(hash_key(key)) for key in "abcdef"]

    def test_a_server_that_starts_waits_for_the_writer(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "START_INTERVAL_S", 0.3)
        monkeypatch.setattr(keys, "START_LOOKS", 5)
        path.write_text(table("alice", "a"))
        writer = threading.Timer(0.15, path.write_text, [table("alice", "a", max_concurrent=1)])
        writer.start()
        assert KeyRing(ServerSettings(api_keys_file=path)).find("a") == Caller("alice", 1)
        writer.join()

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_not_a_file_is_refused_at_once(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        make(tmp_path / "keys.toml")
        with pytest.raises(KeyFileError, match="not a file"):
            KeyRing(ServerSettings(api_keys_file=tmp_path / "keys.toml"))

    async def test_the_app_follows_the_file(
        self, make_client: MakeClient, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("POLL_INTERVAL_S", "SETTLE_S", "CUT_OFF_S"):
            monkeypatch.setattr(keys, name, 0.01)
        async with make_client(api_keys_file=path) as client:
            await asyncio.to_thread(path.write_text, table("alice", "new"))

            async def accepted() -> bool:
                return (await client.get("/v1/models", headers=bearer("new"))).status_code != 401

            await until(accepted)
            assert (await client.get("/v1/models", headers=bearer("a"))).status_code == 401

    @pytest.mark.parametrize("breaks", [MemoryError, ValueError, RuntimeError])
    async def test_whatever_breaks_a_look_the_next_keys_are_taken(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breaks: type[Exception]
    ) -> None:
        for name in ("POLL_INTERVAL_S", "SETTLE_S", "CUT_OFF_S"):
            monkeypatch.setattr(keys, name, 0.01)
        ring, read = KeyRing(ServerSettings(api_keys_file=path)), keys._read

        def broken(_: Path) -> Any:
            raise breaks

        async with ring.watch():
            monkeypatch.setattr(keys, "_read", broken)
            await asyncio.to_thread(path.write_text, table("alice", "new"))
            await until(lambda: any("keys_not_read" in record.getMessage() for record in caplog.records))
            monkeypatch.setattr(keys, "_read", read)
            await until(lambda: ring.find("new") == Caller("alice"))
        assert ring.find("a") is None

    def test_a_look_up_costs_the_same_with_any_number_of_keys(self, path: Path) -> None:
        def seconds(owners: int) -> float:
            path.write_text("".join(table(f"k{number}", str(number)) for number in range(owners)))
            os.utime(path, (0, 0))
            ring = KeyRing(ServerSettings(api_key="one", api_keys_file=path))  # type: ignore[arg-type]
            assert [ring.find(key) for key in ("one", "0", "x")] == [API_KEY_CALLER, Caller("k0"), None]
            started = time.thread_time()
            for number in range(1000):
                ring.find(f"guess {number}")
            return time.thread_time() - started

        assert seconds(2000) < 20 * seconds(1)


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
