"""Whether its jobs may have caused an engine's death."""

import signal
from pathlib import Path

from engine.cgroups import control_files
from engine.config import EXIT_CONFIGURATION

# Sent by a process, not caused by what the engine did.
_OTHERS_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


class OomKills:
    """Recent OOM kills, by the counters of the machine and of this process's memory cgroup (version 2 or 1), in which
    its children run. At first, those since this object was made.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        counters = [
            file for file in control_files("memory", "memory.oom_control", "memory.events", root) if file.is_file()
        ]
        self._files = [root / "proc/vmstat", *counters[:1]]
        self._before = self._last = self._read()

    def refresh(self) -> None:
        """Forget kills before the last refresh, which were of other processes: a killed one ends within seconds."""
        self._before, self._last = self._last, self._read()

    def _read(self) -> list[int | None]:
        return [_oom_kills(path) for path in self._files]

    def may_have_risen(self) -> bool:
        """Return False if one counter has not risen."""
        return not any(a is not None and a == b for a, b in zip(self._read(), self._before, strict=True))


def death_is_evidence(code: int, *, may_be_oom: bool, killed_by_us: bool = False) -> bool:
    """Return whether one of an engine's jobs may have caused its exit code, negative for a signal."""
    if code in (0, EXIT_CONFIGURATION) or -code in _OTHERS_SIGNALS:
        return False
    if code == -signal.SIGKILL:
        return may_be_oom and not killed_by_us
    return True


def _oom_kills(path: Path) -> int | None:
    try:
        counters = dict(line.split()[:2] for line in path.read_text().splitlines() if len(line.split()) == 2)
        return int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
