"""Restarting dead engines and requeuing their jobs before the leases end."""

import asyncio
import logging
import re
import secrets
import signal
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.child import die_with_parent
from engine.config import ENGINES_VARIABLE, EXIT_CONFIGURATION, HAND_BACK_S
from engine.cores import THREADS_VARIABLE, threads_of_engine
from engine.jobs.consumer import JobConsumer
from engine.observability.logs import event
from server.processes.backoff import Backoff
from server.processes.engine_watch import EngineWatch
from server.redis_timeout import with_redis_timeout

_SIGTERM_INTERVAL_S = 0.25
_KILL_TIMEOUT_S = 10.0
REQUEUE_INTERVAL_S, REQUEUE_WITHIN_S = 2.0, 120.0  # Redis may load its data for minutes
REQUEUE_AT_STOP_S = 4.0

logger = logging.getLogger("glimmer.supervisor")


class EngineMisconfigured(Exception):
    """An engine cannot start; its stderr has the reason."""


class Supervisor:
    """Runs one engine for each of `environments` until `stop`.

    Args:
        command: with the program's full path; each start appends a new `--engine-id`.
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
        self._late: set[asyncio.Task[None]] = set()  # requeue jobs once Redis answers

    async def run(self) -> None:
        """Keep all engines running; raise `EngineMisconfigured` if one cannot start. The others run until `stop`."""
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(len(self._environments))]
        ended, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in ended:
            keeper.result()

    async def stop(self, grace_s: float, hurried: asyncio.Event | None = None) -> None:
        """Stop every engine; return when their jobs are free.

        SIGTERM drains; another, after `grace_s` or `hurried`, makes them requeue their jobs; SIGKILL follows after
        `HAND_BACK_S`.
        """
        self._stopping.set()
        await self._end_engines(grace_s, hurried)
        if self._late:
            await asyncio.wait(self._late, timeout=REQUEUE_AT_STOP_S)
        for late in self._late:
            late.cancel()

    async def _end_engines(self, grace_s: float, hurried: asyncio.Event | None) -> None:
        self._signal(signal.SIGTERM)
        if await self._all_ended(grace_s, hurried):
            return
        for _ in range(round(HAND_BACK_S / _SIGTERM_INTERVAL_S)):
            self._signal(signal.SIGTERM)  # repeated: two that arrive at once count as one
            if await self._all_ended(_SIGTERM_INTERVAL_S):
                return
        event(logger, "engines_killed", logging.WARNING, count=self._alive, grace_s=grace_s)
        self._signal(signal.SIGKILL)
        if not await self._all_ended(_KILL_TIMEOUT_S):
            event(logger, "engines_left", logging.ERROR, count=self._alive)  # in the kernel: a lost device

    @property
    def _alive(self) -> int:
        return sum(process.returncode is None for process in self._processes.values())

    def _signal(self, sig: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(OSError):
                process.send_signal(sig)

    async def _all_ended(self, timeout_s: float, hurried: asyncio.Event | None = None) -> bool:
        """Return whether all engines end and their jobs are requeued before the timeout and `hurried`."""
        ends = [*(asyncio.ensure_future(process.wait()) for process in self._processes.values()), *self._keepers]
        if not ends:
            return True
        all_ended = asyncio.create_task(asyncio.wait(ends))
        hurry = asyncio.create_task(hurried.wait()) if hurried else None
        waits: list[asyncio.Task[Any]] = [all_ended, hurry] if hurry else [all_ended]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        return all(end.done() for end in ends)

    async def _keep(self, index: int) -> None:
        clock = asyncio.get_running_loop().time
        delay, has_worked = 0.0, False
        while not self._stopping.is_set():
            engine_id = f"engine-{index}-{secrets.token_hex(4)}"
            started_at = clock()
            code = await self._run_once(index, engine_id)
            if self._stopping.is_set():
                return
            uptime = clock() - started_at
            has_worked |= uptime >= self._backoff.reset_after
            if code == EXIT_CONFIGURATION and not has_worked:
                raise EngineMisconfigured(f"engine {index} cannot start with these settings; its message is above")
            delay = self._backoff.next_delay(delay, uptime)
            event(logger, "engine_died", logging.ERROR, engine=engine_id, exit_code=code, restart_in_s=delay)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def _run_once(self, index: int, engine_id: str) -> int | None:
        """Run an engine and free its jobs; return its exit code, None if not started."""
        watch = EngineWatch()
        try:
            process = await self._start(index, engine_id)
        except OSError as error:  # no memory, no process left, or the interpreter was replaced
            event(logger, "engine_not_started", logging.ERROR, engine=engine_id, reason=error)
            return None
        self._processes[index] = process
        event(logger, "engine_started", engine=engine_id, pid=process.pid)
        if self._stopping.is_set():  # `stop` has missed this process
            process.send_signal(signal.SIGTERM)
        watching = asyncio.create_task(watch.run(process))
        try:
            code = await process.wait()
        finally:
            watching.cancel()
        blame = watch.is_evidence(code, killed_by_us=self._stopping.is_set())
        await self._requeue_jobs(engine_id, blame=blame)
        return code

    async def _start(self, index: int, engine_id: str) -> Process:
        return await asyncio.create_subprocess_exec(
            # A surviving engine would hold a GPU for nothing.
            *die_with_parent([*self._command, "--engine-id", engine_id], signal.SIGKILL),
            env=dict(self._environments[index]),
            # Ctrl+C is for this process alone: engines finish.
            start_new_session=True,
        )

    async def _requeue_jobs(self, engine_id: str, *, blame: bool) -> None:
        """Requeue a dead engine's jobs. If Redis fails, try on in the background: a lapse of their leases blames."""
        if not await self._try_to_requeue(engine_id, blame=blame):
            late = asyncio.create_task(self._requeue_late(engine_id, blame=blame))
            self._late.add(late)
            late.add_done_callback(self._late.discard)

    async def _requeue_late(self, engine_id: str, *, blame: bool) -> None:
        until = asyncio.get_running_loop().time() + REQUEUE_WITHIN_S
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(REQUEUE_INTERVAL_S)
            if await self._try_to_requeue(engine_id, blame=blame):
                return

    async def _try_to_requeue(self, engine_id: str, *, blame: bool) -> bool:
        try:
            jobs = await with_redis_timeout(self._queue.requeue_all(engine_id, blame=blame))
            await with_redis_timeout(self._queue.deregister(engine_id))
        except Exception as error:  # the engine must be restarted all the same
            event(logger, "jobs_not_requeued", logging.WARNING, engine=engine_id, reason=error)
            return False
        if jobs:
            event(logger, "jobs_surrendered", logging.WARNING, engine=engine_id, jobs=jobs, blamed=blame)
        return True


def engine_environments(base: Mapping[str, str], count: int, device: str) -> list[dict[str, str]]:
    """Return each engine's environment, with GPUs assigned in turn, CPU threads and memory divided."""
    gpus = _gpus(base) if count > 1 and device in ("auto", "cuda") else []
    environments = []
    for index in range(count):
        environment = dict(base)
        if count > 1:
            environment.setdefault(THREADS_VARIABLE, str(threads_of_engine(count)))
            environment[ENGINES_VARIABLE] = str(count)
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
