"""CPU cores of an engine. No torch: OpenMP reads these variables when torch loads it."""

import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from engine.cgroups import control_files
from engine.config import ENGINES_VARIABLE

THREADS_VARIABLE, WAIT_VARIABLE = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use, by its affinity and its container's quota; a part counts as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in control_files("cpu", "cpu.cfs_quota_us", "cpu.max", root):
        with suppress(OSError, ValueError):  # not there, or "max"
            quota, *period = map(int, file.read_text().split())
            period = period or [int(file.with_name("cpu.cfs_period_us").read_text())]
            if quota > 0 and period[0] > 0:
                cores = min(cores, -(-quota // period[0]))
    return cores


def threads_of_engine(engines: int) -> int:
    """Return the threads of each of so many engines: as many for all, since bytes depend on them."""
    return max(1, usable_cores() // engines)


def engines_of_machine(environment: Mapping[str, str]) -> int:
    """Return how many engines share this machine, as far as their supervisor says."""
    engines = environment.get(ENGINES_VARIABLE, "")
    return max(1, int(engines)) if engines.isdecimal() else 1


def set_thread_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what OpenMP reads, unless it is set: the engine's share of the cores, and threads that wait asleep.

    Threads that spin take the cores of other engines, and of the threads that they wait for: two engines, each with
    as many threads as cores, rendered half as fast as one, and one beside a busy process a third.
    """
    environment.setdefault(THREADS_VARIABLE, str(threads_of_engine(engines_of_machine(environment))))
    environment.setdefault(WAIT_VARIABLE, "passive")
