"""Memory and file descriptors of a process."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

MIB = 2**20


def memory(pid: int, kind: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Return the resident bytes of a process, now or at most since its start."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    return 0


def descriptors(pid: int) -> int:
    """Return the number of files and sockets, except Unix sockets: the connection pool to Redis does not shrink."""
    unix = {f"socket:[{line.split()[6]}]" for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += str(descriptor.readlink()) not in unix
    return count
