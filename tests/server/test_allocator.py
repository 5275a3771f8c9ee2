"""Memory that a process keeps after large responses."""

import subprocess
import sys

HOLD_AND_FREE = """
from pathlib import Path
from server.processes.allocator import return_large_allocations
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
return_large_allocations()
before, small = resident(), []
for megabytes in (27, 26, 25):  # the first round moves glibc's threshold
    large = []
    for _ in range(10):
        buffer = bytearray()
        buffer += b"x" * (megabytes * 1_000_000)
        large.append(buffer)
        small.append(bytearray(b"y" * 50_000))
    held = resident() - before
    del large  # the last buffer stays, in the last round, too
print(held, resident() - before)
"""


def test_large_allocations_are_returned() -> None:
    output = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], capture_output=True, text=True, check=True).stdout
    held, kept = map(int, output.split())
    assert held > 200_000_000
    assert kept < held / 5


PIN_AND_FREE = """
from pathlib import Path
from server.processes.allocator import IdleMemory, return_large_allocations
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
return_large_allocations()
idle, before = IdleMemory(), resident()
for size in (600_000, 700_000, 800_000):
    bodies = [b"x" * (size + n) for n in range(300)]
    last = b"y" * size
    held = resident() - before
    idle.give_back()
    in_use = resident() - before
    del bodies
    idle.give_back()
    print(held, in_use, resident() - before)
"""


def test_memory_below_what_is_in_use_is_returned() -> None:
    output = subprocess.run([sys.executable, "-c", PIN_AND_FREE], capture_output=True, text=True, check=True).stdout
    for line in output.splitlines():
        held, in_use, kept = map(int, line.split())
        assert in_use > held * 0.9 > 150_000_000
        assert kept < held / 5
