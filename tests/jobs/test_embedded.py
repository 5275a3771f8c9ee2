"""The embedded server starts, keeps its data, locks its folder, and ends with its parent."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from engine.errors import QueueUnavailable
from engine.jobs import data_folder, embedded
from engine.jobs.data_folder import drop_trailing_zeros
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


class TestFolder:
    def test_folder_and_files_are_private(self, tmp_path: Path):
        previous = os.umask(0o022)
        try:
            with EmbeddedRedis(tmp_path / "new") as server, client(server) as connection:
                connection.set("a", 1)
                modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
                assert not any(mode & 0o077 for mode in modes.values()), modes
                assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        finally:
            os.umask(previous)

    def test_those_of_older_versions_are_closed_to_others(self, tmp_path: Path):
        EmbeddedRedis(tmp_path / "old").stop()
        for path in (tmp_path / "old", *(tmp_path / "old").iterdir()):
            path.chmod(0o755)
        EmbeddedRedis(tmp_path / "old").stop()
        modes = {path.name: path.stat().st_mode & 0o777 for path in ((tmp_path / "old"), *(tmp_path / "old").iterdir())}
        assert not any(mode & 0o077 for mode in modes.values()), modes

    def test_a_folder_with_other_files_keeps_its_mode(self, tmp_path: Path):
        """It might be /tmp."""
        (tmp_path / "shared").mkdir(mode=0o755)
        (tmp_path / "shared" / "other").touch(mode=0o644)
        EmbeddedRedis(tmp_path / "shared").stop()
        assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755
        assert (tmp_path / "shared" / "other").stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "shared" / "appendonly.aof").stat().st_mode & 0o777 == 0o600

    def test_a_name_that_is_not_utf_8(self, tmp_path: Path):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcll"))
        with EmbeddedRedis(folder) as server, client(server) as connection:
            connection.set("a", 1)
        with EmbeddedRedis(folder) as server, client(server) as connection:
            assert connection.get("a") == b"1"

    def test_one_in_which_no_socket_can_be_made(self, tmp_path: Path):
        """As on a file system without them: the socket lies elsewhere."""
        (tmp_path / "redis.sock").mkdir()
        with EmbeddedRedis(tmp_path) as server, client(server) as connection:
            connection.set("a", 1)
            assert server._socket.parent != tmp_path
        assert not server._socket.parent.exists()

    def test_without_a_temporary_folder_the_remedy_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(embedded.tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(QueueUnavailable, match="TMPDIR"):
            EmbeddedRedis(tmp_path / ("d" * 120))
        monkeypatch.undo()
        EmbeddedRedis(tmp_path / ("d" * 120)).stop()  # it was unlocked

    @pytest.mark.parametrize("name", ["file", "file/below", "loop"])
    def test_one_that_cannot_be_used_is_named(self, tmp_path: Path, name: str):
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(QueueUnavailable, match=rf"{tmp_path / name} .*--data-dir"):
            EmbeddedRedis(tmp_path / name)


class TestDamagedFile:
    @pytest.fixture
    def written(self, tmp_path: Path) -> Path:
        with EmbeddedRedis(tmp_path) as server, client(server) as connection:
            connection.set("a", b"\0" * 9)  # zeros that belong to a command
        return tmp_path / "appendonly.aof"

    @pytest.mark.parametrize(
        "tail",
        [b"\0", b"\0" * 37, b"\0" * 100_000, b"*3\r\n$3\r\nSET", b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$9\r\n" + b"\0" * 40],
    )
    def test_what_a_power_cut_leaves_is_dropped(self, written: Path, tail: bytes):
        whole = written.read_bytes()
        written.write_bytes(whole + tail)
        with EmbeddedRedis(written.parent) as server, client(server) as connection:
            assert (connection.get("a"), connection.get("b")) == (b"\0" * 9, None)
        assert written.read_bytes() == whole

    @pytest.mark.parametrize(
        "tail",
        [
            b"garbage",
            b"\0" * 500 + b"\xff" * 500,  # a page that was never written, and what lay there before
            b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$9\r\nnot nine bytes long",
            b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n" + b"\0" * 4096 + b"x",
            b"*3\r\n$3\r\nSET\r\n$-1\r\n",
            bytes(range(256)) * 100,
        ],
    )
    def test_an_end_that_cannot_be_read_is_kept_apart(self, written: Path, tail: bytes):
        whole = written.read_bytes()
        written.write_bytes(whole + tail)
        with EmbeddedRedis(written.parent) as server, client(server) as connection:
            assert (connection.get("a"), connection.get("b")) == (b"\0" * 9, None)
        assert written.read_bytes() == whole
        (copy,) = written.parent.glob("appendonly.aof.damaged-*")
        assert tail.endswith(copy.read_bytes())
        assert copy.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("before", [b"", b"garbage"])
    def test_commands_after_a_damaged_place_are_never_dropped(self, written: Path, before: bytes):
        """They were acknowledged. Nor is a file of which nothing can be read."""
        damaged = before or written.read_bytes() + b"garbage" + written.read_bytes()
        written.write_bytes(damaged)
        with pytest.raises(QueueUnavailable, match="--fix"):
            EmbeddedRedis(written.parent)
        assert written.read_bytes() == damaged

    def test_without_room_for_the_copy_nothing_is_cut(self, written: Path, monkeypatch: pytest.MonkeyPatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        damaged = written.read_bytes() + b"garbage"
        written.write_bytes(damaged)
        monkeypatch.setattr(data_folder.os, "fsync", full)
        with pytest.raises(QueueUnavailable, match="--fix"):
            EmbeddedRedis(written.parent)
        assert written.read_bytes() == damaged

    def test_a_file_of_an_rdb_preamble_may_end_in_zeros(self, written: Path):
        """They may be its checksum."""
        written.write_bytes(b"REDIS0009" + b"x" * 20 + b"\0" * 8)
        assert list(drop_trailing_zeros(written.parent)) == []
        written.write_bytes(b"REDIS0009" + b"x" * 20 + b"*1\r\n$4\r\nPING\r\n" + b"\0" * 9)
        assert list(drop_trailing_zeros(written.parent)) == [(written, 9)]

    def test_other_damage_is_reported_with_a_command_that_repairs_it(self, written: Path):
        whole = written.read_bytes()
        written.write_bytes(whole + b"garbage" + whole)
        with pytest.raises(QueueUnavailable, match="Bad file format") as caught:
            EmbeddedRedis(written.parent)
        (command,) = re.findall(r"\(exec -a redis-check-aof .*? --fix .*?\)", str(caught.value))
        assert "\n" not in str(caught.value)
        subprocess.run(["bash", "-c", command], input=b"y\n", check=True)
        with EmbeddedRedis(written.parent) as server, client(server) as connection:
            assert connection.get("a") == b"\0" * 9


def test_a_disk_that_is_full_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(QueueUnavailable, match="no space left"):
        EmbeddedRedis(tmp_path)


def test_a_full_disk_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with EmbeddedRedis(tmp_path) as server:
        monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        assert "no space left" in server.last_words()
