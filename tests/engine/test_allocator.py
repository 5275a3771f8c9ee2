"""Memory that tensors leave is used again."""

import os
import subprocess
import sys

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from engine.renderer.allocator import keep_freed_memory
    keep_freed_memory()
def decode():
    parts = [torch.ones(n << 18) for n in (1, 4, 16, 28, 28, 28)]  # MiB
for _ in range(3):
    decode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    decode()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # glibc's, which it may raise by itself
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_freed_memory_is_not_mapped_anew() -> None:
    assert faults("kept") < faults("returned") / 10
