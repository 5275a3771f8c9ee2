"""The folder of the embedded Redis: private, without what a power cut appends."""

import errno
import mmap
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

_OURS = ("redis.lock", "redis.log", "redis.sock", "appendonly.aof*", "appendonlydir", "temp-*", "lost+found")
_CHUNK_BYTES = 64 * 2**10
_CHECK_TIMEOUT_S = 600.0
_READABLE = re.compile(rb"ok_up_to=(\d+)")
_COMMAND = re.compile(rb"\*\d{1,7}\r\n\$\d{1,10}\r\n[^\r\n]+\r\n")
_CHECKSUM_BYTES = 8  # ends an RDB preamble; may be zeros


def make_private(folder: Path) -> None:
    """Create a private folder, or close an existing one to others if it holds only our files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = list(folder.iterdir())
    ours = [path for path in entries if any(fnmatch(path.name, name) for name in _OURS)]
    if len(ours) == len(entries):
        _restrict(folder, 0o700)
    for path in (*ours, *folder.glob("appendonlydir/*")):
        if path.is_fifo():  # opening it would wait for its other end
            raise OSError(errno.EINVAL, f"{path.name} in it is a pipe, not a file")
        _restrict(path, 0o700 if path.is_dir() else 0o600)


def drop_trailing_zeros(folder: Path) -> Iterator[tuple[Path, int]]:
    """Cut trailing zeros off append-only files; yield each changed file with their number.

    A complete command ends with a line break: zeros belong to an unacknowledged one, whose rest Redis
    drops (`aof-load-truncated`).
    """
    for path in (folder / "appendonly.aof", *folder.glob("appendonlydir/*.incr.aof")):
        if not path.is_file():
            continue
        with path.open("r+b") as file:
            size, kept = path.stat().st_size, _size_without_zeros(file.fileno())
            if kept == size or _may_be_checksum(file.fileno(), kept, size):
                continue
            file.truncate(kept)
            os.fsync(file.fileno())
        yield path, size - kept


def last_append_only_file(folder: Path) -> Path:
    """Return the file that Redis appends to."""
    parts = [path for path in folder.glob("appendonlydir/*.incr.aof") if _part_number(path) is not None]
    return max(parts, key=lambda path: _part_number(path) or 0, default=folder / "appendonly.aof")


def cut_damaged_end(binary: Path, folder: Path) -> tuple[Path, int, Path] | None:
    """Cut off the end of the append-only file if nothing there can be read; return file, bytes and their copy.

    An end without any command is an unacknowledged write that a power cut has spoilt. Commands after a damaged place
    were acknowledged: then, and if nothing before it can be read, nothing is changed.

    Args:
        binary: `redis-server`, which checks files under the name redis-check-aof.

    Raises:
        OSError, subprocess.SubprocessError
    """
    path = last_append_only_file(folder)
    if not path.is_file():
        return None
    check = subprocess.run(
        ["redis-check-aof", str(path)],
        executable=binary,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_CHECK_TIMEOUT_S,
    )
    found = _READABLE.search(check.stdout)
    if found is None or not 0 < (kept := int(found[1])) < path.stat().st_size:
        return None
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if _COMMAND.search(data, kept + 1):
                return None
            end = data[kept:]
        copy = folder / f"appendonly.aof.damaged-{time.time_ns()}"
        with open(copy, "xb", opener=_open_private) as saved:
            saved.write(end)
            saved.flush()
            os.fsync(saved.fileno())
        file.truncate(kept)
        os.fsync(file.fileno())
    return path, len(end), copy


def _part_number(path: Path) -> int | None:
    match = re.search(r"\.(\d+)\.incr\.aof$", path.name)
    return int(match[1]) if match else None


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _may_be_checksum(file: int, kept: int, size: int) -> bool:
    """Return whether a file may be only an RDB preamble, whose last bytes may be zeros."""
    is_command = os.pread(file, 2, max(0, kept - 2)) == b"\r\n"
    return os.pread(file, 5, 0) == b"REDIS" and (size - kept <= _CHECKSUM_BYTES or not is_command)


def _size_without_zeros(file: int) -> int:
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        if kept := len(os.pread(file, end - start, start).rstrip(b"\0")):
            return start + kept
        end = start
    return 0


def _restrict(path: Path, mode: int) -> None:
    status = path.lstat()
    if status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(mode)
