"""Restarts dead engines and requeues their jobs at once, before the leases end."""

import asyncio
import logging
import os
import re
import secrets
import signal
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.child import die_with_parent
from engine.config import EXIT_CONFIGURATION, HAND_BACK_S
from engine.errors import QueueUnavailable
from engine.jobs.consumer import JobConsumer
from engine.observability.logs import event
from server.redis_timeout import with_redis_timeout

logger = logging.getLogger("glimmer.supervisor")


class EngineMisconfigured(Exception):
    """An engine cannot start with its settings; its stderr has the reason."""


@dataclass(frozen=True)
class Backoff:
    """Seconds before a restart: `initial`, doubled up to `maximum`; reset after an uptime of `reset_after`."""

    initial: float = 1.0
    maximum: float = 30.0
    reset_after: float = 60.0

    def next_delay(self, last_delay: float, uptime: float) -> float:
        """Return the delay after `last_delay`, which is 0 at first."""
        if uptime >= self.reset_after or not last_delay:
            return self.initial
        return min(2 * last_delay, self.maximum)


class Supervisor:
    """Runs one engine for each of `environments` until `stop`.

    Args:
        command: with the program's full path; every start appends a new `--engine-id ID`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        queue: JobConsumer,
        *,
        backoff: Backoff = Backoff(),
    ) -> None:
        self._command = list(command)
        self._environments = environments
        self._queue = queue
        self._backoff = backoff
        self._processes: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep all engines running; raise `EngineMisconfigured` if one cannot start."""
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(len(self._environments))]
        try:
            await asyncio.gather(*self._keepers)
        finally:
            for keeper in self._keepers:
                keeper.cancel()

    async def stop(self, grace_s: float) -> None:
        """Stop every engine; return when their jobs are free.

        SIGTERM drains; after `grace_s` a second one makes them requeue their jobs, `HAND_BACK_S` later SIGKILL.
        """
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if await self._all_ended(grace_s):
            return
        self._signal(signal.SIGTERM)
        if not await self._all_ended(HAND_BACK_S):
            count = sum(process.returncode is None for process in self._processes.values())
            event(logger, "engines_killed", logging.WARNING, count=count, grace_s=grace_s)
            self._signal(signal.SIGKILL)
            await self._all_ended(None)

    def _signal(self, sig: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(sig)

    async def _all_ended(self, timeout_s: float | None) -> bool:
        """Return whether all engines end and their jobs are requeued in time."""
        exits = [asyncio.ensure_future(process.wait()) for process in self._processes.values()]
        if not (tasks := [*exits, *self._keepers]):
            return True
        _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        return not pending

    async def _keep(self, index: int) -> None:
        clock = asyncio.get_running_loop().time
        delay = 0.0
        while not self._stopping.is_set():
            engine_id = f"engine-{index}-{secrets.token_hex(4)}"
            started_at = clock()
            code = await self._run_once(index, engine_id)
            await self._requeue_jobs(engine_id)
            if self._stopping.is_set():
                return
            if code == EXIT_CONFIGURATION:
                raise EngineMisconfigured(f"engine {index} cannot start with these settings; its message is above")
            delay = self._backoff.next_delay(delay, clock() - started_at)
            event(logger, "engine_died", logging.ERROR, engine=engine_id, exit_code=code, restart_in_s=delay)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def _run_once(self, index: int, engine_id: str) -> int:
        process = await asyncio.create_subprocess_exec(
            # An engine must not outlive this process: it would hold a GPU for nothing.
            *die_with_parent([*self._command, "--engine-id", engine_id], signal.SIGKILL),
            env=dict(self._environments[index]),
            # Ctrl+C is for this process alone: engines finish.
            start_new_session=True,
        )
        self._processes[index] = process
        event(logger, "engine_started", engine=engine_id, pid=process.pid)
        if self._stopping.is_set():  # `stop` has missed this process
            process.send_signal(signal.SIGTERM)
        return await process.wait()

    async def _requeue_jobs(self, engine_id: str) -> None:
        """Requeue a dead engine's jobs; without Redis their leases expire."""
        with suppress(QueueUnavailable):
            jobs = await with_redis_timeout(self._queue.requeue_all(engine_id))
            await with_redis_timeout(self._queue.deregister(engine_id))
            if jobs:
                event(logger, "jobs_surrendered", logging.WARNING, engine=engine_id, jobs=jobs)


def engine_environments(base: Mapping[str, str], count: int, device: str) -> list[dict[str, str]]:
    """Return each engine's environment, with GPUs assigned in turn and CPU threads divided."""
    gpus = _gpus(base) if count > 1 and device in ("auto", "cuda") else []
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environments = []
    for index in range(count):
        environment = dict(base)
        if count > 1:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        environments.append(environment)
    return environments


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the usable CUDA devices without loading CUDA."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return sorted(
        (match[1] for node in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", node.name))),
        key=int,
    )
