import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD_BYTES = 4 << 20
TRIM_BYTES = 24 << 20

_PAGE_BYTES = 4096
_libc = ctypes.CDLL(None)


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, of all arenas."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def return_large_allocations() -> None:
    """Map each allocation over 4 MiB by itself, so that freeing it returns the memory.

    glibc otherwise raises that threshold up to 32 MiB when the first is freed, and what small neighbours pin stays with
    the process: 0.8 GB after 20 responses of 27 MB. Smaller buffers use memory again: mapping those of a 1 MB image
    anew took 1.5 times the CPU of its response.
    """
    if mallopt := getattr(_libc, "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * MMAP_THRESHOLD_BYTES)


class IdleMemory:
    """Free memory that glibc keeps below allocations in use: 200 MiB after 200 stalled uploads."""

    def __init__(self) -> None:
        self._after_last = _idle_bytes()

    def give_back(self) -> None:
        """Return it if it is `TRIM_BYTES` more than after the last time. Takes up to 20 ms."""
        if _idle_bytes() > self._after_last + TRIM_BYTES:
            _libc.malloc_trim(0)
            self._after_last = _idle_bytes()


def _idle_bytes() -> int:
    """Return private memory less allocations, which includes Python's arenas; 0 without glibc 2.33."""
    mallinfo = getattr(_libc, "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * _PAGE_BYTES - info.uordblks - info.hblkhd
