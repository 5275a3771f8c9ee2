"""What cannot start ends in one line and exit code 2: no traceback, no hang."""

import asyncio
import itertools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import StartError
from engine.jobs.connection import connect
from engine.jobs.masters import SentinelMaster
from engine.observability.logs import JsonFormatter
from server.settings import ServerSettings, default_data_dir
from tests.server.test_cli import glimmer

REWRITER = ("--prompt-rewriter", "http://rewriter.example/v1")
BAD_URLS = [
    *("foo://host", "host:6379", "redis://host:abc/0", "redis://host:99999/0", "redis://host/abc", "redis://host/-1"),
    *("redis://host/0?db=x", "redis://host/0?db=-1", "redis://host/0?nothing=1", "redis://:secret/word@host/0"),
    *("redis://host/0?decode_responses=true", "redis://host/0?socket_timeout=x", "unix://", "unix:relative"),
    *("rediss://host/0?ssl_cert_reqs=bogus", "redis://[host/0"),
    *("redis+sentinel://host", "redis+sentinel://host/", "redis+sentinel:///main", "redis+sentinel://a,,b/main"),
    *("redis+sentinel://a:x,b/main", "redis+sentinel://host/main/x", "redis+sentinel://host/main?nothing=1"),
    *("redis+cluster://", "redis+cluster://host/1", "redis+cluster://host?db=1", "unix+cluster://host"),
    *("rediss+cluster://host?ssl_cert_reqs=bogus", "redis+sentinel://:secret/word@host/main"),
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_redis_url_that_cannot_be_used(url: str) -> None:
    with pytest.raises(StartError, match="write it like redis://host:6379/0") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://h/", "redis://:p%2F@h:1/7", "rediss://u:p@h/0", "unix:///a b.sock"),
        *("redis+sentinel://h/main", "redis+sentinel://u:p%2F@a:1,b,[::1]:3/main/7", "rediss+sentinel://a,b/main/"),
        *("redis+cluster://h", "redis+cluster://:p@a:1,b/0", "rediss+cluster://a?ssl_check_hostname=false"),
    ],
)
def test_a_redis_url_that_can(url: str) -> None:
    connect(url)


def test_the_parts_of_a_url_with_several_servers() -> None:
    url = "rediss+sentinel://user:p%2F%2C@a:1,b,[::1]:3/main/7?sentinel_password=s&ssl_check_hostname=false"
    options = connect(url).connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("user", "p/,", 7)
    master = options["master"]
    assert isinstance(master, SentinelMaster)
    assert list(itertools.islice(master._servers, 3)) == [("a", 1), ("b", 26379), ("::1", 3)]
    assert (master._name, master._options["password"], master._options["ssl"]) == ("main", "s", True)
    assert "username" not in master._options
    assert options["ssl_check_hostname"] is master._options["ssl_check_hostname"]


@pytest.mark.parametrize("command", ["api", "engine", "serve"])
def test_every_process_says_so_on_one_line(command: str) -> None:
    started = glimmer(command, "--redis-url", "redis://host:abc/0")
    assert (started.exit_code, started.stderr.count("\n")) == (2, 1), started.output
    assert "GLIMMER_REDIS_URL" in started.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:1"},
        {"ALL_PROXY": "foo://127.0.0.1:1"},
        {"SSL_CERT_FILE": "/nowhere"},
        {"SSL_CERT_FILE": os.devnull},
    ],
)
@pytest.mark.parametrize("command", ["api", "serve"])
def test_an_api_whose_start_up_raises(tmp_path: Path, command: str, variables: dict[str, str]) -> None:
    where = ("--redis-url", "unix:///nowhere.sock") if command == "api" else ("--data-dir", str(tmp_path))
    ended = run(command, "--port", "0", *where, *REWRITER, **variables)
    assert ended.returncode == 2
    assert "glimmer: the API cannot start: " in ended.stderr
    assert all(name in ended.stderr.splitlines()[-1] for name in variables)
    assert "Traceback" not in ended.stderr
    assert "listens" not in ended.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("GLIMMER_PROMPT_REWRITER_KEY", key) for key in ("ü", "a\nb", "a b", "a\x7f")),
        *(
            ("GLIMMER_CORS_ORIGINS", origin)
            for origin in ("http://[::1", "http://a:b", "http://a:99999", "http://\x01")
        ),
        *(("GLIMMER_PUBLIC_URL", url) for url in ("http://é\x01x", "http://a\x01", "http://[::1", "http://a:99999")),
        *(("GLIMMER_REDIS_URL", f"rediss://h/0?{name}=/nowhere") for name in ("ssl_ca_certs", "ssl_certfile")),
    ],
)
def test_the_setting_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("GLIMMER_REDIS_URL", "unix:///nowhere.sock")
    monkeypatch.setenv(name, value)
    started = glimmer("api", "--port", "0")
    assert (started.exit_code, started.stderr.count("\n")) == (2, 1), started.output
    assert name in started.stderr


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_data_folder_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    started = glimmer("serve", "--port", "0", "--data-dir", str(tmp_path / name))
    assert (started.exit_code, started.stderr.count("\n")) == (2, 1), started.output
    assert str(tmp_path / name) in started.stderr


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(StartError, match="--data-dir"):
        default_data_dir()
    started = glimmer("serve")
    assert (started.exit_code, started.stderr.count("\n")) == (2, 1), started.output


def test_the_port_of_a_kubernetes_service_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIMMER_PORT", "tcp://10.43.1.39:8000")
    assert ServerSettings().port == 8000
    started = glimmer("api", "--redis-url", "redis://host:abc/0")
    assert "GLIMMER_REDIS_URL" in started.stderr  # it has come so far


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_streams_that_cannot_be_written(closed: str) -> None:
    command = f"{sys.executable} -m server.cli api --port 0 --redis-url redis://host:abc/0 {closed}"
    assert subprocess.run(["bash", "-c", command], timeout=30).returncode == 2


def test_a_log_line_holds_any_value() -> None:
    record = logging.makeLogRecord({"msg": "x", "event": "x", "fields": {"path": Path("/m\udcfcll"), "number": 2**70}})
    assert re.search(r"m\\udcfcll", JsonFormatter().format(record))


async def test_no_exit_waits_for_a_thread() -> None:
    program = """
import asyncio, time
from engine.stop_signals import run
from server.cli.process import end_process
async def main():
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
run(main())
end_process(7)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await asyncio.wait_for(process.wait(), 20) == 7


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")}
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
