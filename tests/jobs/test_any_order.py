"""The queue against a small model of it: any calls by two engines and an API, in any order."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.errors import QueueFull, SourcesFull
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import TERMINAL_STATES, Budget, Claim, JobError, JobSources, Plan, QueueStats
from engine.jobs.queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, submit

CAP, SOURCES_CAP, MAX_RUNS = 5, 8, 3
ENGINES = st.sampled_from(["engine-1", "engine-2"])
RECENT = st.integers(0, 3)  # how many jobs or claims to go back: mostly live ones, sometimes stale ones


@dataclass
class Job:
    """What the model knows of a job, and of its entry in the stream."""

    id: str
    images: int
    late: bool  # its deadline was over when it was submitted
    sources: int  # bytes
    state: str = "queued"
    runs: int = 0
    epoch: int = 0
    owner: str | None = None
    drawn: bool = False
    handed_back: bool = False
    plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.state in ("queued", "running")


@dataclass
class Model:
    """Jobs by stream, oldest first; a job leaves its list when its stream entry is deleted."""

    streams: dict[str, list[Job]] = field(default_factory=lambda: {"interactive": [], "batch": []})
    granted: int = 0

    def count(self, state: str) -> int:
        return sum(job.state == state for jobs in self.streams.values() for job in jobs)

    @property
    def sources(self) -> int:
        return sum(job.sources for jobs in self.streams.values() for job in jobs if job.live)

    def end(self, job: Job, state: str) -> None:
        """An entry no engine has drawn stays in the stream."""
        job.state = state
        if job.drawn:
            self.delete(job)

    def delete(self, job: Job) -> None:
        for jobs in self.streams.values():
            jobs[:] = [other for other in jobs if other is not job]

    def draw(self, budget: Budget, all_lapsed: bool) -> Job | None:
        """The job a claim must be granted, after all that it must clear away."""
        order = ["batch", "interactive"] if (self.granted + 1) % 4 == 0 else ["interactive", "batch"]
        for priority in order:
            while (job := self._head(priority, all_lapsed)) is not None:
                if not job.live:
                    self.delete(job)
                elif job.late or job.runs >= MAX_RUNS:
                    job.drawn = True
                    self.end(job, "expired" if job.late else "failed")
                elif budget.idle or (job.runs < 2 and job.images <= budget.images):
                    job.drawn = True
                    return job
                else:
                    return None
        return None

    def _head(self, priority: str, all_lapsed: bool) -> Job | None:
        jobs = self.streams[priority]
        lapsed = (job for job in jobs if job.drawn and (all_lapsed or job.handed_back))
        return next(lapsed, None) or next((job for job in jobs if not job.drawn), None)


class QueueMachine(RuleBasedStateMachine):
    server: EmbeddedRedis

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.model = Model()
        self.jobs: list[Job] = []
        self.claims: list[tuple[str, Job, Claim]] = []
        self.touched: list[Job] = []  # by the last call, as far as it named a job

    @initialize()
    def open(self):
        self.run(self._open())

    async def _open(self):
        self.client = connect(self.server.url)
        await self.client.flushdb()
        self.queue = JobQueue(self.client, max_runs=MAX_RUNS)
        self.impatient = JobQueue(self.client, max_runs=MAX_RUNS, lease_ms=0)
        self.events = self.client.pubsub()
        await self.events.subscribe("glimmer:events")

    def teardown(self):
        self.run(self._close())
        self.runner.close()

    async def _close(self):
        """Every job that ended was announced as ended once, and no other."""
        ends = list[str]()
        while (message := await self.events.get_message(timeout=0.01)) is not None:
            event = orjson.loads(message["data"]) if message["type"] == "message" else {}
            if event.get("state") in TERMINAL_STATES:
                ends.append(event["job"])
        await self.events.aclose()
        await self.client.flushdb()
        await self.client.aclose()
        assert sorted(ends) == sorted(job.id for job in self.jobs if not job.live)

    # --- API ----------------------------------------------------------------------------------------------------

    @rule(
        priority=st.sampled_from(["interactive", "batch"]),
        images=st.integers(1, 3),
        late=st.sampled_from([False] * 9 + [True]),
        sources=st.sampled_from([0, 0, 1, 3, 5, 9]),
    )
    def submit(self, priority: Any, images: int, late: bool, sources: int):
        job = Job(f"job-{len(self.jobs)}", images, late, sources)
        call = submit(
            self.queue,
            job_id=job.id,
            timeout_s=0 if late else 600,
            priority=priority,
            max_queue=CAP,
            sources=JobSources([b"x" * sources]) if sources else None,
            max_source_bytes=SOURCES_CAP,
            n=images,
        )
        refusal = None
        if sources and self.model.sources and self.model.sources + sources > SOURCES_CAP:
            refusal = SourcesFull
        if self.model.count("queued") >= CAP:
            refusal = QueueFull
        if refusal:
            with pytest.raises(refusal):
                self.run(call)
            return
        self.run(call)
        self.model.streams[priority].append(job)
        self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule(back=RECENT, call=st.sampled_from(["cancel", "expire", "submit again"]))
    def call_api(self, back: int, call: str):
        job = self.jobs[-1 - back % len(self.jobs)]
        self.touched = [job]
        if call == "cancel":
            assert self.run(self.queue.cancel(job.id)) == job.live
            if job.live:
                self.model.end(job, "cancelled")
        elif call == "expire":
            assert self.run(self.queue.expire(job.id)) == (job.live and job.late)
            if job.live and job.late:
                self.model.end(job, "expired")
        else:
            self.run(submit(self.queue, job_id=job.id, max_queue=CAP, sources=JobSources([b"again"])))

    # --- engines ------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(self.model.streams.values()))
    @rule(engine=ENGINES, images=st.integers(1, 3), idle=st.sampled_from([True, True, False]))
    def claim(self, engine: str, images: int, idle: bool):
        self._claim(self.queue, engine, Budget(images, 10**9, 0, idle))

    @precondition(lambda self: self.model.count("running"))
    @rule(engine=ENGINES)
    def claim_when_leases_have_lapsed(self, engine: str):
        self._claim(self.impatient, engine, IDLE)

    def _claim(self, queue: JobQueue, engine: str, budget: Budget):
        granted = self.run(queue.claim(engine, budget))
        job = self.model.draw(budget, all_lapsed=queue is self.impatient)
        if job is None:
            assert granted is None
            return
        self.model.granted += 1
        job.runs, job.epoch, job.owner = job.runs + 1, job.epoch + 1, engine
        job.state, job.handed_back = "running", False
        assert granted is not None
        assert (granted.job_id, granted.epoch, granted.runs) == (job.id, job.epoch, job.runs)
        assert (granted.exclusive, granted.plans) == (job.runs > 2, job.plans)
        self.claims.append((engine, job, granted))
        self.touched = [job]

    @precondition(lambda self: self.claims)
    @rule(back=RECENT, call=st.sampled_from(["renew", "progress", "checkpoint"]), index=st.integers(0, 2))
    def write(self, back: int, call: str, index: int):
        engine, job, claim, holds = self._claim_back(back)
        if call == "renew":
            assert self.run(self.queue.renew(engine, [claim])) == ([] if holds else [claim])
        elif call == "progress":
            assert self.run(self.queue.progress(claim, {"step": 1})) == holds
        else:
            plan = Plan(1, 1, [claim.epoch])
            assert self.run(self.queue.checkpoint_plan(claim, index, plan)) == holds
            if holds:
                job.plans[index] = plan

    @precondition(lambda self: self.claims)
    @rule(back=RECENT, how=st.sampled_from(["succeeded", "failed"]))
    def end(self, back: int, how: str):
        _, job, claim, holds = self._claim_back(back)
        call = self.queue.commit(claim, RESULT) if how == "succeeded" else self.queue.fail(claim, JobError("no"))
        assert self.run(call) == holds
        if holds:
            self.model.end(job, how)

    @precondition(lambda self: self.claims)
    @rule(back=RECENT)
    def release(self, back: int):
        engine, job, claim, holds = self._claim_back(back)
        assert self.run(self.queue.release(engine, claim)) == holds
        if holds:
            job.state, job.handed_back, job.runs = "queued", True, job.runs - 1

    def _claim_back(self, back: int) -> tuple[str, Job, Claim, bool]:
        """A recent claim, and whether it is still good."""
        engine, job, claim = self.claims[-1 - back % len(self.claims)]
        self.touched = [job]
        return engine, job, claim, job.state == "running" and job.epoch == claim.epoch

    @precondition(lambda self: self.model.count("running"))
    @rule(engine=ENGINES)
    def crash(self, engine: str):
        lost = [job for job in self.jobs if job.state == "running" and job.owner == engine]
        assert self.run(self.queue.surrender(engine)) == len(lost)
        for job in lost:
            job.state, job.handed_back = "queued", True
        self.touched = lost

    # --- always -------------------------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self):
        waiting, running = self.model.count("queued"), self.model.count("running")
        assert self.run(self.queue.stats()) == QueueStats(waiting, running, self.model.sources)

    @invariant()
    def streams_hold_what_is_not_finished(self):
        for priority, jobs in self.model.streams.items():
            entries: Any = self.run(self._range(priority))
            assert [fields[b"job"].decode() for _, fields in entries] == [job.id for job in jobs]

    async def _range(self, priority: str) -> Any:
        return await self.client.xrange(f"glimmer:queue:{priority}")

    @invariant()
    def records_agree(self):
        self.run(self._check_records())

    async def _check_records(self):
        for job in self.touched:
            record = await self.queue.get(job.id)
            assert record is not None
            assert (record.state, record.runs) == (job.state, job.runs)
            assert (await self.queue.result(job.id) is not None) == (job.state == "succeeded")
            assert await self.client.hlen(f"glimmer:plans:{job.id}") == (len(job.plans) if job.live else 0)
            assert await self.client.exists(f"glimmer:sources:{job.id}") == bool(job.live and job.sources)


@pytest.mark.timeout(600)  # a failure takes Hypothesis up to five minutes to make small
def test_any_order_of_calls_keeps_the_queue_right(redis_server: EmbeddedRedis):
    QueueMachine.server = redis_server
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
