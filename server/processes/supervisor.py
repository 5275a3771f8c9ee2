"""Keeps the engine processes of one machine running.

A dead engine's jobs are surrendered at once, so that another engine need not wait for their leases, and the engine is
started again after a pause that doubles while it keeps dying. Engines die with this process, however it ends.
"""

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
    """An engine cannot start with its settings; it has said why on stderr. Starting it again would not help."""


@dataclass(frozen=True)
class Backoff:
    """The pause before an engine is started again, in seconds: `first`, doubled each time, at most `most`.

    An engine that lived for `steady` starts over at `first`.
    """

    first: float = 1.0
    most: float = 30.0
    steady: float = 60.0

    def after(self, last: float, lived: float) -> float:
        return self.first if lived >= self.steady or not last else min(2 * last, self.most)


class Supervisor:
    """Runs one engine for each of `environments` until `stop`.

    Args:
        command: starts one engine, the program by its full path; `--engine-id ID` is appended, new for every start.
        environments: the environment variables of each engine.
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
        """Keeps all engines running until it is cancelled or `stop` was called.

        Raises:
            EngineMisconfigured: an engine ended with `EXIT_CONFIGURATION`.
        """
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(len(self._environments))]
        try:
            await asyncio.gather(*self._keepers)
        finally:
            for keeper in self._keepers:
                keeper.cancel()

    async def stop(self, grace_s: float) -> None:
        """Asks every engine to drain; after `grace_s` seconds asks again, which means to hand the jobs back; kills what
        is left when that has had its time. Returns when all jobs are free."""
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

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def _all_ended(self, timeout_s: float | None) -> bool:
        """Whether, in that time, all engines ended and their keepers gave their jobs to others."""
        ends = [asyncio.ensure_future(process.wait()) for process in self._processes.values()]
        if not (ends := [*ends, *self._keepers]):
            return True
        _, left = await asyncio.wait(ends, timeout=timeout_s)
        return not left

    async def _keep(self, slot: int) -> None:
        """Starts the engine of one slot, again and again."""
        clock = asyncio.get_running_loop().time
        pause = 0.0
        while not self._stopping.is_set():
            engine_id = f"engine-{slot}-{secrets.token_hex(4)}"
            started = clock()
            code = await self._run_once(slot, engine_id)
            await self._clear_up(engine_id)
            if self._stopping.is_set():
                return
            if code == EXIT_CONFIGURATION:
                raise EngineMisconfigured(f"engine {slot} cannot start with these settings; its message is above")
            pause = self._backoff.after(pause, clock() - started)
            event(logger, "engine_died", logging.ERROR, engine=engine_id, exit_code=code, restart_in_s=pause)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _run_once(self, slot: int, engine_id: str) -> int:
        process = await asyncio.create_subprocess_exec(
            # However we end, an engine must not live on: it would hold a GPU for jobs that nobody hands out.
            *die_with_parent([*self._command, "--engine-id", engine_id], signal.SIGKILL),
            env=dict(self._environments[slot]),
            # A session of its own: Ctrl+C in a terminal goes to us, and we let the engines finish their work.
            start_new_session=True,
        )
        self._processes[slot] = process
        event(logger, "engine_started", engine=engine_id, pid=process.pid)
        if self._stopping.is_set():  # `stop` did not see it
            process.send_signal(signal.SIGTERM)
        return await process.wait()

    async def _clear_up(self, engine_id: str) -> None:
        """Gives a dead engine's jobs to the others now. Without Redis their leases run out by themselves."""
        with suppress(QueueUnavailable):
            jobs = await with_redis_timeout(self._queue.requeue_all(engine_id))
            await with_redis_timeout(self._queue.deregister(engine_id))
            if jobs:
                event(logger, "jobs_surrendered", logging.WARNING, engine=engine_id, jobs=jobs)


def engine_environments(base: Mapping[str, str], count: int, device: str) -> list[dict[str, str]]:
    """The environment of each of `count` engines on this machine: GPUs dealt out, CPU threads divided."""
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
    """The CUDA devices engines may use, found without loading CUDA into this process."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return sorted(
        (match[1] for node in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", node.name))),
        key=int,
    )
