"""The embedded server starts, keeps its data, locks its folder, and ends with its parent."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from engine.errors import QueueUnavailable
from engine.jobs import embedded
from engine.jobs.embedded import EmbeddedRedis, find_redis_server
from tests.jobs.helpers import TIMEOUT_S, kill, restart


def client(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def test_data_survives_a_stop_and_a_kill(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server, client(server) as connection:
        connection.set("a", b"\0\xff")
    assert not server.alive
    with EmbeddedRedis(tmp_path) as server, client(server) as connection:
        assert connection.get("a") == b"\0\xff"
        connection.set("b", 1)
        kill(server)
        restart(server)
        assert (connection.get("a"), connection.get("b")) == (b"\0\xff", b"1")


@pytest.mark.parametrize(("chosen", "fsync"), [({}, "always"), ({"fsync": "no"}, "no")])
def test_acknowledged_writes_are_on_the_disk_unless_fsync_is_no(tmp_path: Path, chosen: dict[str, Any], fsync: str):
    """With `everysec` and a slow disk, a killed server loses acknowledged writes."""
    with EmbeddedRedis(tmp_path, **chosen) as server, client(server) as connection:
        settings: Any = connection.config_get("append*")
        assert (settings["appendonly"], settings["appendfsync"]) == ("yes", fsync)


def test_a_restart_does_not_wait_for_the_server(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server:
        kill(server)
        assert not server.answers()
        server._binary = slow = tmp_path / "slow"
        slow.write_text("#!/bin/sh\nexec sleep 60\n")
        slow.chmod(0o755)
        started = time.monotonic()
        server.restart()
        assert time.monotonic() - started < TIMEOUT_S
        assert server.alive
        assert not server.answers()


def test_it_listens_on_a_private_socket_only(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server, client(server) as connection:
        assert connection.config_get("port") == {"port": "0"}
        assert (tmp_path / "redis.sock").stat().st_mode & 0o777 == 0o700


def test_a_second_server_in_the_same_folder_is_refused(tmp_path: Path):
    with EmbeddedRedis(tmp_path) as server:
        with pytest.raises(QueueUnavailable, match="in use"):
            EmbeddedRedis(tmp_path)
        with client(server) as connection:
            assert connection.ping()
    EmbeddedRedis(tmp_path).stop()


@pytest.mark.parametrize("name", ["d" * 120, "with space, % and ü"])
def test_any_folder_can_be_used(tmp_path: Path, name: str):
    with EmbeddedRedis(tmp_path / name) as server, client(server) as connection:
        connection.set("a", 1)
        socket = Path(str(connection.config_get("unixsocket")["unixsocket"]))
    assert (tmp_path / name / "redis.lock").exists()
    assert not socket.exists()
    assert socket.parent == tmp_path / name or not socket.parent.exists()


def test_stop_can_be_called_twice(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    server.stop()
    server.stop()
    assert not server.alive


def test_it_ends_when_its_parent_is_killed(tmp_path: Path):
    program = f"""
import pathlib, time
from engine.jobs.embedded import EmbeddedRedis
server = EmbeddedRedis(pathlib.Path({str(tmp_path)!r}))
print(server.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    EmbeddedRedis(tmp_path).stop()  # waits until the orphan has released the folder
    assert _gone(pid)


def _gone(pid: int) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_without_a_binary_the_error_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QueueUnavailable, match=r"glimmer\[embedded\].*GLIMMER_REDIS_URL"):
        find_redis_server()
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    assert find_redis_server() == tmp_path / "redis-server"


def test_a_server_that_does_not_start_raises_and_unlocks_the_folder(tmp_path: Path):
    (tmp_path / "appendonly.aof").mkdir()
    (tmp_path / "appendonlydir").write_text("not a folder")
    with pytest.raises(QueueUnavailable, match="did not start"):
        EmbeddedRedis(tmp_path)
    (tmp_path / "appendonly.aof").rmdir()
    (tmp_path / "appendonlydir").unlink()
    EmbeddedRedis(tmp_path).stop()
