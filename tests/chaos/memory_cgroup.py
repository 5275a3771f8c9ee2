"""A memory cgroup with a limit, whose processes the kernel kills when they need more."""

import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
REMOVE_S = 2.0  # until the kernel has freed a killed process


class NoMemoryCgroup(Exception):
    """None can be made here; the message says why."""


class MemoryCgroup:
    """A new cgroup of version 1 or 2, next to the root.

    Raises:
        NoMemoryCgroup: the rights or the controller are missing.
    """

    def __init__(self, name: str, limit_bytes: int):
        self._name, self._is_v1 = name, (ROOT / "memory").is_dir()
        self._folder = (ROOT / "memory" if self._is_v1 else ROOT) / name
        try:
            if not self._is_v1:
                (ROOT / "cgroup.subtree_control").write_text("+memory")
            self._folder.mkdir()
            limit = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
            (self._folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            with suppress(OSError):
                self._folder.rmdir()
            raise NoMemoryCgroup(str(error)) from error

    def add(self, pid: int) -> None:
        """Move a process into it; what it has allocated before is not counted."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def view(self, root: Path) -> Path:
        """Make a root folder for `OomKills`, as a process in the cgroup sees it."""
        (root / "proc/self").mkdir(parents=True)
        (root / "sys/fs").mkdir(parents=True)
        (root / "proc/vmstat").symlink_to("/proc/vmstat")
        (root / "proc/self/cgroup").write_text(f"{'1:memory' if self._is_v1 else '0:'}:/{self._name}\n")
        (root / "sys/fs/cgroup").symlink_to(ROOT)
        return root

    def remove(self) -> None:
        """Remove it once its processes have ended."""
        give_up_at = time.monotonic() + REMOVE_S
        while time.monotonic() < give_up_at:
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.02)
