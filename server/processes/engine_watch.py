"""What a supervisor sees of a running engine, and what its end says."""

import asyncio
import logging
from asyncio.subprocess import Process
from contextlib import suppress

from engine.observability.logs import event
from engine.worker.status import StatusFile, read_statuses
from server.processes.engine_death import OomKills, death_is_evidence

POLL_INTERVAL_S = 5.0
HUNG_S = 60.0  # the engine's own watchdog is faster, unless no Python code can run
STOPPED_S = 300.0

logger = logging.getLogger("glimmer.supervisor")


class EngineWatch:
    """Kills an engine whose status file gets old; create it before the engine starts.

    An engine without a file is left alone: it loads, ends, or cannot write.
    """

    def __init__(self) -> None:
        self._oom_kills = OomKills()
        self._looked_at: tuple[float, bool] | None = None
        self._waited_s = 0.0
        self._hung: bool | None = None  # set when it was killed

    async def run(self, process: Process) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            self._oom_kills.refresh()
            status = None
            with suppress(OSError):
                status = next((status for status in read_statuses() if status.pid == process.pid), None)
            if self.must_die(status):
                event(logger, "engine_hangs", logging.ERROR, pid=process.pid, stopped=not self._hung)
                with suppress(ProcessLookupError):
                    process.kill()

    def must_die(self, status: StatusFile | None) -> bool:
        """Judge an engine at each poll.

        Polls are counted, not seconds: this process may have been stopped with the engine.
        """
        look = (status.written_at, status.is_stopped) if status is not None and status.is_alive else None
        self._waited_s = self._waited_s + POLL_INTERVAL_S if look is not None and look == self._looked_at else 0.0
        self._looked_at = look
        if look is None or self._waited_s < (STOPPED_S if look[1] else HUNG_S):
            return False
        self._hung = not look[1]
        return True

    def is_evidence(self, code: int, *, killed_by_us: bool) -> bool:
        """Return whether one of the engine's jobs may have caused its exit code."""
        if self._hung is not None:
            return self._hung
        return death_is_evidence(code, may_be_oom=self._oom_kills.may_have_risen(), killed_by_us=killed_by_us)
