"""Memory that an engine shares with other processes."""

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from engine.cgroups import control_files
from engine.observability.logs import event

LOCK_TIMEOUT_S = 60.0  # allocating takes seconds; a hanging holder must not block others
LOCK_POLL_INTERVAL_S = 0.05

logger = logging.getLogger("glimmer.engine")


@contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Let one process per host at a time read a CUDA device's free memory and allocate.

    The lock file is in the temporary folder, which containers may not share.
    """
    if device.type != "cuda":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"glimmer-{torch.cuda.get_device_properties(device).uuid}.lock"
    try:
        file = _open(path)
    except OSError as error:
        event(logger, "device_not_locked", logging.WARNING, path=path, reason=str(error))
        yield
        return
    try:
        lock_for_a_time(file, path)
        yield
    finally:
        os.close(file)


def take_from_device(device: torch.device, size: int) -> None:
    """Move `size` bytes of a CUDA device, if free, to torch's cache, from other processes' reach."""
    if device.type == "cuda":
        with suppress(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=device)


def host_memory(root: Path = Path("/")) -> int:
    """Return this process's memory limit in bytes, the container's or the host's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in control_files("memory", "memory.limit_in_bytes", "memory.max", root):
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def _open(path: Path) -> int:
    """Open this user's lock file; raise OSError if something else is there."""
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(file)
        raise PermissionError(f"{path} is not a regular file of this user")
    return file


def lock_for_a_time(file: int, path: Path) -> None:
    """Wait for an exclusive lock on an open file, `LOCK_TIMEOUT_S` at most."""
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return event(logger, "device_not_locked", logging.WARNING, path=path, reason="held for too long")
            time.sleep(LOCK_POLL_INTERVAL_S)
