"""An engine's state in a file, for health checks without Redis. No torch."""

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.observability.logs import event

INTERVAL_S = 1.0
MAX_AGE_S = 10.0
"""Without a new file for so long, the event loop hangs or the process is stopped."""

_REMOVE_AFTER_S = 60.0

EngineState = Literal["starting", "ready", "draining", "stuck"]

logger = logging.getLogger("glimmer.engine")


@dataclass(frozen=True)
class StatusFile:
    """What one engine wrote.

    Args:
        born: start of the process in ticks since boot: pids are reused.
        written_at: monotonic seconds.
    """

    id: str
    pid: int
    born: str
    state: str
    written_at: float

    @property
    def is_alive(self) -> bool:
        """Return whether the process exists."""
        return _born(self.pid) == self.born

    @property
    def is_stopped(self) -> bool:
        """Return whether a signal or debugger has stopped the process."""
        return _stat(self.pid)[:1] in (["T"], ["t"])

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.written_at


class EngineStatus:
    """Writes the file every second, on the event loop: a hanging loop shows."""

    def __init__(self, engine_id: str) -> None:
        self.state: Callable[[], EngineState] = lambda: "starting"
        self._id, self._pid, self._born = engine_id, os.getpid(), _born(os.getpid())
        self._failed = False

    async def keep(self) -> None:
        """Write until cancelled."""
        while True:
            try:
                self.write()
            except OSError as error:
                with suppress(OSError):
                    self._path.unlink()  # an old file would say that this process hangs
                if not self._failed:
                    event(logger, "status_not_written", logging.WARNING, folder=status_folder(), reason=error)
                self._failed = True
            await asyncio.sleep(INTERVAL_S)

    def write(self) -> None:
        """Replace the file; raise OSError."""
        folder = status_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_private(folder)
        temporary = self._path.with_suffix(".new")
        status = StatusFile(self._id, self._pid, self._born, self.state(), time.monotonic())
        temporary.write_text(json.dumps(asdict(status)))
        temporary.replace(self._path)

    def remove(self) -> None:
        """Delete the file, and those of killed engines."""
        with suppress(OSError):
            self._path.unlink()
            for status in read_statuses():
                if not status.is_alive and status.age_s > _REMOVE_AFTER_S:
                    _path(status.pid).unlink()

    @property
    def _path(self) -> Path:
        return _path(self._pid)


def status_folder() -> Path:
    """Return this user's private folder for the files."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:  # none can be written: the caller's error names this one
        folder = "/tmp"
    return Path(folder, f"glimmer-engines-{os.geteuid()}")


def read_statuses() -> list[StatusFile]:
    """Return all files of this machine or container; raise OSError if others may write them."""
    folder = status_folder()
    if not folder.exists():
        return []
    _require_private(folder)
    statuses = []
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):  # removed meanwhile, or of another version
            statuses.append(StatusFile(**json.loads(path.read_text())))
    return statuses


def _path(pid: int) -> Path:
    return status_folder() / f"{pid}.json"


def _require_private(folder: Path) -> None:
    """Raise OSError if others can write into a folder below the temporary one."""
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o170077 != 0o040000:
        raise PermissionError(f"{folder} is not a private folder of this user")


def _stat(pid: int) -> list[str]:
    """Return a process's state and further fields, nothing without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _born(pid: int) -> str:
    """Return when a process started, "" if it has ended; its pid without /proc."""
    if fields := _stat(pid):
        return "" if fields[0] == "Z" else fields[19]
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
