import asyncio
import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace

from engine.config import HAND_BACK_S, EngineSettings
from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import Claim, EngineInfo, JobSpec
from engine.observability.logs import event
from engine.observability.tracing import Tracing
from engine.request import Event, Request
from engine.tasks import stop
from engine.worker import watchdog
from engine.worker.capacity import free_capacity
from engine.worker.job_runner import REDIS_RETRY_S, JobRunner, Lost, RunningJob
from engine.worker.plan_cache import PlanCache
from engine.worker.previews import PreviewRunner
from engine.worker.status import EngineState
from engine.worker.watchdog import Watchdog, exit_within

HEARTBEAT_S, HEARTBEAT_TTL_S = 1.0, 5.0
CLAIM_POLL_INTERVAL_S = 0.5  # in case a wake-up was lost

logger = logging.getLogger("glimmer.engine")


class Worker:
    """Takes jobs from the queue and runs them on the engine, which has its own thread.

    Args:
        info: content of the heartbeats; `info.id` is also the consumer's name.
        planner: the model's planning fingerprint; without it, all weights are read here.
    """

    def __init__(
        self,
        engine: Engine,
        queue: JobConsumer,
        info: EngineInfo,
        settings: EngineSettings,
        tracing: Tracing = Tracing(),
        *,
        planner: str | None = None,
    ):
        self._tracing = tracing
        self._engine, self._queue, self._info, self._settings = engine, queue, info, settings
        self._jobs: dict[str, RunningJob] = {}  # by request id, new with every claim
        self._job_tasks: set[asyncio.Task[None]] = set()
        self._capacity_changed = asyncio.Event()  # also set by `drain`
        self._draining = asyncio.Event()
        self._step_hangs = asyncio.Event()
        self._hand_back = asyncio.Event()  # the grace period is over
        self._stopping = threading.Event()
        self._wake_engine = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._renewed_at = time.monotonic()
        self._redis_was_away = False
        self._watchdog = Watchdog(self._running_specs, on_cpu=engine.model.device.type == "cpu")
        engine.on_progress(self._watchdog.beat)
        queue.planner = planner = planner or engine.model.planning_fingerprint()
        self._runner = JobRunner(
            engine,
            queue,
            info.id,
            PlanCache(queue, planner, settings.plan_cache_s),
            stopping=self._stopping,
            wake_engine=self._wake_engine.set,
            capacity_changed=self._capacity_changed.set,
        )
        self._taking = asyncio.Lock()
        self._previews = PreviewRunner(
            engine,
            queue,
            may_take=self._may_take_work,
            taking=self._taking,
            stopping=self._stopping,
            wake_engine=self._wake_engine.set,
        )

    async def run(self) -> None:
        """Work until `drain`.

        Raises:
            Exception: the engine's thread failed.
        """
        thread = asyncio.ensure_future(asyncio.to_thread(self._engine_loop))
        threading.Thread(target=self._watch, daemon=True).start()
        coroutines = (self._renew_loop, self._watch_ends, self._heartbeat_loop, self._watchdog_loop)
        loops = [asyncio.ensure_future(loop()) for loop in coroutines]
        if self._engine.model.stage != "plan":
            loops.append(asyncio.ensure_future(self._previews.run()))
        claiming = asyncio.ensure_future(self._claim_loop())
        try:
            await asyncio.wait({thread, claiming, *loops}, return_when=asyncio.FIRST_COMPLETED)
            for task in (thread, claiming, *loops):
                if task.done():
                    task.result()
            await self._finish_jobs({thread, *loops})
        finally:
            blame = not self._draining.is_set() and any(map(_has_failed, (thread, claiming)))
            with exit_within(watchdog.STEP_TIMEOUT_S):  # the thread may hang in a step
                await self._end({claiming, *loops}, blame=blame)
                await thread

    @property
    def state(self) -> EngineState:
        """Return what heartbeats and health checks report."""
        return "stuck" if self._watchdog.is_stuck else "draining" if self._draining.is_set() else "ready"

    def drain(self) -> None:
        """Stop claiming; `run` returns after the jobs or the grace period, which a second call ends."""
        event(logger, "draining", jobs=len(self._jobs))
        if self._draining.is_set():
            self._hand_back.set()
        self._draining.set()
        self._capacity_changed.set()

    # --- threads ------------------------------------------------------------------------------------------

    def _engine_loop(self) -> None:
        while not self._stopping.is_set():
            self._watchdog.beat()
            if self._engine.is_idle:
                self._wake_engine.wait(HEARTBEAT_S)
                self._wake_engine.clear()
            if events := self._engine.step():
                self._loop.call_soon_threadsafe(self._dispatch, events)

    def _watch(self) -> None:
        """Check in a thread: the event loop may hang, too."""
        while not self._stopping.wait(watchdog.TICK_S):
            if self._watchdog.check():
                self._loop.call_soon_threadsafe(self._step_hangs.set)
                if not self._stopping.wait(2 * watchdog.HAND_BACK_S):
                    watchdog.end_process("a step and the event loop hang")
            elif self._watchdog.is_loop_stuck:
                watchdog.end_process("the event loop hangs")

    def _dispatch(self, events: list[Event]) -> None:
        for engine_event in events:
            if engine_event.request.id in self._jobs:
                self._jobs[engine_event.request.id].events.put_nowait(engine_event)
            else:
                self._previews.dispatch(engine_event)

    # --- loops --------------------------------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        """Claim only what the engine can admit at once: others may have room."""
        while not self._draining.is_set():
            self._capacity_changed.clear()
            async with self._taking:
                if claim := await self._next_claim():
                    self._start_job(claim)
            if claim is not None:
                continue
            waits: set[asyncio.Task] = {
                asyncio.create_task(self._queue.wait_for_work(CLAIM_POLL_INTERVAL_S)),
                asyncio.create_task(self._capacity_changed.wait()),
            }
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()

    async def _next_claim(self) -> Claim | None:
        if self._watchdog.is_stuck:
            return None  # a renewal would take back the reported death
        try:
            if self._redis_was_away or time.monotonic() - self._renewed_at > self._settings.lease_s / 2:
                await self._wait_for_lease_renewals()
            capacity = free_capacity(self._engine.limits, self._jobs.values())
            if capacity.images <= 0 or not self._may_take_work():
                return None
            idle = capacity.idle and self._previews.request is None
            return await self._queue.claim(self._info.id, replace(capacity, idle=idle))
        except QueueUnavailable:
            self._redis_was_away = True
            await asyncio.sleep(REDIS_RETRY_S)
            return None

    def _may_take_work(self) -> bool:
        """Return whether a job or a preview may run beside the jobs: a suspect runs alone."""
        if any(job.claim.quarantined for job in self._jobs.values()):
            return False
        return not (self._draining.is_set() or self._watchdog.is_stuck)

    def _running_specs(self) -> list[JobSpec]:
        preview = self._previews.request
        return [job.claim.spec for job in self._jobs.values()] + ([preview.spec] if preview else [])

    async def _wait_for_lease_renewals(self) -> None:
        """Let all engines renew after an outage, or a claim would return jobs that still run."""
        await self._queue.ping()
        await self._renew_leases()
        self._redis_was_away = False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.lease_s / 4 + REDIS_RETRY_S):
                await self._draining.wait()

    # Loops check `_stopping`: a Redis call can swallow a cancellation.

    async def _renew_loop(self) -> None:
        while not self._stopping.is_set():
            await asyncio.sleep(self._settings.lease_s / 4)
            with suppress(QueueUnavailable):
                await self._renew_leases()

    async def _renew_leases(self) -> None:
        if self._watchdog.is_stuck:
            return  # the leases lapse, should `give_up` not reach Redis
        for claim in await self._queue.renew(self._info.id, [job.claim for job in self._jobs.values()]):
            self._drop(_request_id(claim))
        self._renewed_at = time.monotonic()

    async def _watch_ends(self) -> None:
        async for job_id in self._queue.ended():
            for job in [job for job in self._jobs.values() if job.claim.job_id == job_id]:
                self._drop(job.request.id)

    async def _heartbeat_loop(self) -> None:
        while not self._stopping.is_set():
            images = sum(job.claim.spec.n for job in self._jobs.values())
            info = replace(self._info, state=self.state, images_running=images)
            with suppress(QueueUnavailable):
                await self._queue.heartbeat(info, self._engine.metrics.exposition(), HEARTBEAT_TTL_S)
            await asyncio.sleep(HEARTBEAT_S)

    async def _watchdog_loop(self) -> None:
        """Beat apart from the heartbeats, which wait for Redis."""
        while not self._stopping.is_set():
            self._watchdog.beat_loop()
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._step_hangs.wait()
                self._step_hangs.clear()
                await self._watchdog.give_up(self._queue, self._info.id)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _start_job(self, claim: Claim) -> None:
        deadline_at = time.monotonic() + (claim.deadline_ms - claim.claimed_at) / 1000
        request = Request(_request_id(claim), claim.spec, deadline_at, plans=dict(claim.plans))
        if not claim.handed_over:
            self._engine.metrics.plans_resumed.inc(len(claim.plans))
            self._engine.metrics.queued.observe((claim.claimed_at - claim.submitted_at) / 1000)
        job = self._jobs[request.id] = RunningJob(claim, request, self._tracing.run(claim, self._info.id))
        task = asyncio.ensure_future(self._run_job(job))
        self._job_tasks.add(task)
        task.add_done_callback(self._job_tasks.discard)

    async def _run_job(self, job: RunningJob) -> None:
        try:
            await self._runner.run(job)
        finally:
            del self._jobs[job.request.id]
            self._capacity_changed.set()

    def _drop(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].events.put_nowait(Lost())

    async def _finish_jobs(self, needed: set[asyncio.Future[None]]) -> None:
        """Let jobs finish until the grace period or a needed task ends; hand back others."""
        if self._job_tasks:
            ends = asyncio.create_task(asyncio.wait(self._job_tasks))
            over = asyncio.create_task(self._hand_back.wait())
            await asyncio.wait({ends, over, *needed}, timeout=self._settings.grace_s, return_when="FIRST_COMPLETED")
            over.cancel()
        for job in list(self._jobs.values()):
            with suppress(QueueUnavailable):
                await self._queue.requeue(self._info.id, job.claim)
                event(logger, "job_handed_back", **job.log_fields)
            self._drop(job.request.id)

    async def _end(self, tasks: set[asyncio.Future[None]], *, blame: bool) -> None:
        """End all tasks; hand back what is left, if Redis answers in time.

        Args:
            blame: the jobs may be why the engine's thread or the taking of a job failed.
        """
        self._stopping.set()
        self._wake_engine.set()
        await asyncio.gather(*(stop(task) for task in (*tasks, *self._job_tasks)))
        until = time.monotonic() + HAND_BACK_S / 2
        with suppress(Exception):
            while time.monotonic() < until:
                with suppress(QueueUnavailable):
                    await self._queue.requeue_all(self._info.id, blame)  # some are left only after a failure
                    await self._queue.deregister(self._info.id)
                    return
                await asyncio.sleep(REDIS_RETRY_S)


def _has_failed(task: asyncio.Future[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _request_id(claim: Claim) -> str:
    return f"{claim.job_id}/{claim.epoch}"
