"""Compare the queue with a model: any calls by two engines and an API, in any order.

Leases and TTLs are hours long; rules lapse a lease or pass a deadline by writing to Redis. `tests.jobs.planted_bugs`
measures which bugs this finds.
"""

import asyncio
from dataclasses import replace
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
from redis.exceptions import ResponseError

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import (
    TERMINAL_STATES,
    Claim,
    FreeCapacity,
    HandedOver,
    JobError,
    Plan,
    QueueStats,
    SourceImages,
    Stage,
    TokenGrid,
)
from engine.jobs.results import PartialImage
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, pass_deadline, spec, submit
from tests.jobs.queue_model import CAP, OWNED_CAP, SOURCES_CAP, Job, Model

LEASE_MS = 3_600_000
# For every edit here, but no generation.
LITTLE_KV = spec(n=3, num_sources=1, source_tokens=9).prompt_tokens_bound + 12
CAPACITIES = st.sampled_from(
    [
        IDLE,
        IDLE,
        IDLE,
        ROOMY,
        ROOMY,
        ROOMY,
        replace(ROOMY, images=1),
        replace(ROOMY, kv_tokens=LITTLE_KV),
        replace(ROOMY, source_tokens=0),
    ]
)
ENGINES = st.sampled_from(["engine-1", "engine-2"])
STAGES = st.sampled_from(["all", "all", "plan", "render"])
HANDED_OVER = HandedOver(3, [TokenGrid(1, 2, [5, 6])])
CALLS = (
    "submit again",
    "expire",
    "time passes",
    "cancel",
    "discard",
    "discard a result",
    "discard before the submit",
)
PRIORITIES = st.sampled_from(["interactive", "batch"])
RECENT = st.sampled_from([0, 0, 1, 2, 3, 3])  # how many jobs or claims to go back
SIZES = settings(max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class QueueMachine(RuleBasedStateMachine):
    server: EmbeddedRedis

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.model = Model()
        self.claims: list[tuple[str, Job, Claim]] = []
        self.attempts: dict[str, tuple[str, Job, Claim]] = {}  # the last granted one of each engine
        self.touched: list[Job] = []  # by the last call, where it named a job
        self.submits = 0

    @initialize()
    def open(self):
        self.run(self._open())

    async def _open(self):
        self.client = connect(self.server.url)
        await self.client.flushdb()
        self.queue = JobQueue(self.client, lease_ms=LEASE_MS, result_ttl_s=3600, orphan_ms=LEASE_MS)
        self.events = self.client.pubsub()
        await self.events.subscribe("glimmer:events")

    def teardown(self):
        self.run(self._close())
        self.runner.close()

    async def _close(self):
        """Check that each ended job, and no other, published its end once."""
        ends = list[str]()
        while (message := await self.events.get_message(timeout=0.01)) is not None:
            event = orjson.loads(message["data"]) if message["type"] == "message" else {}
            if event.get("state") in TERMINAL_STATES:
                ends.append(event["job"])
        await self.events.aclose()
        await self.client.flushdb()
        await self.client.aclose()
        assert sorted(ends) == sorted(job.id for job in self.model.jobs if not job.live)

    # --- API ----------------------------------------------------------------------------------------------------

    @rule(
        priority=PRIORITIES,
        images=st.integers(1, 3),
        late=st.sampled_from([False] * 9 + [True]),
        sources=st.sampled_from([0, 0, 0, 1, 3, 5, 9]),
        owner=st.sampled_from(["anna", "bob"]),
        api=st.sampled_from([""] * 6 + ["api-1", "api-2"]),
        job_format=st.sampled_from([1] * 9 + [2]),
        key=st.sampled_from(["", "", "k"]),
        fingerprint=st.sampled_from(["f", "f", "g"]),
        steps=st.sampled_from([1, 1, 2, 50]),
    )
    def submit(self, key: str, fingerprint: str, job_format: int, **fields: Any):
        self.submits += 1
        job = Job(f"job-{self.submits}", format=job_format, **fields)
        if not self._submit(job, key, fingerprint) and key:
            self._submit(job, key, "another")  # a refused submit has not stored its key
        if job in self.model.jobs and job_format > 1:
            self.run(self.client.hset(f"glimmer:job:{job.id}", "format", job_format))  # type: ignore[arg-type]

    def _submit(self, job: Job, key: str, fingerprint: str) -> bool:
        call = submit(
            self.queue,
            job_id=job.id,
            timeout_s=0 if job.late else 3600,
            priority=job.priority,
            max_queue=CAP,
            source_images=SourceImages([b"x" * job.sources]) if job.sources else None,
            source_tokens=job.sources,
            max_source_bytes=SOURCES_CAP,
            owner=job.owner,
            max_owned=OWNED_CAP,
            idempotency_key=key,
            fingerprint=fingerprint,
            api_id=job.api,
            n=job.images,
            num_inference_steps=job.steps,
        )
        expected = self.model.submit(job, key, fingerprint)
        if isinstance(expected, Job):
            assert self.run(call) == expected.id
            self.touched = [expected]
            return True
        with pytest.raises(expected) as raised:
            self.run(call)
        assert raised.type is expected
        return False

    @precondition(lambda self: any(job.live or job.has_result for job in self.model.jobs))
    @rule(back=RECENT, call=st.sampled_from(CALLS))
    def call_api(self, back: int, call: str):
        live = [job for job in self.model.jobs if job.live]
        chosen = live if live and back < 3 else self.model.jobs
        job = chosen[-1 - back % len(chosen)]
        if call == "discard a result":
            call, job = "discard", next((job for job in reversed(self.model.jobs) if job.has_result), job)
        self.touched = [job]
        if call == "expire":
            assert self.run(self.queue.expire(job.id)) == (job.live and job.late)
            if job.live and job.late:
                self.model.end(job, "expired")
        elif call == "submit again":
            self.run(submit(self.queue, job_id=job.id, max_queue=CAP, source_images=SourceImages([b"again"])))
        elif call == "discard before the submit":
            self.submits += 1
            late = f"job-{self.submits}"
            assert not self.run(self.queue.discard(late))
            self.run(submit(self.queue, job_id=late, max_queue=10**6))
            assert self.run(self.queue.get(late)) is None
        elif call == "time passes":
            self._pass_deadline(job)
        else:
            assert self.run(self.queue.cancel(job.id) if call == "cancel" else self.queue.discard(job.id)) == job.live
            if call == "discard":
                job.has_result, job.partials = False, set()
            if job.live:
                self.model.end(job, "cancelled")

    @precondition(lambda self: any(job.live and job.api for job in self.model.jobs))
    @rule(api=st.sampled_from(["api-1", "api-2"]), what=st.sampled_from(["lives", "is silent", "is silent", "outage"]))
    def api_process(self, api: str, what: str):
        jobs = [job for job in self.model.jobs if job.live and job.api == api]
        if what == "lives":
            self.run(self.queue.api_heartbeat(api))
        elif what == "is silent":
            self.run(self._silence(api, jobs))
            self.model.heard = True
        else:
            self.run(self.client.hset("glimmer:heard", "at", 0))  # type: ignore[arg-type]
            self.model.heard = False
        for job in jobs:
            job.orphaned = what != "lives" if what != "outage" else job.orphaned

    async def _silence(self, api: str, jobs: list[Job]):
        """Let the API be silent for long while heartbeats of others arrive."""
        seconds, microseconds = await self.client.time()
        times = {"at": 1000 * seconds + microseconds // 1000, "since": 0}
        await self.client.hset("glimmer:heard", mapping=times)  # type: ignore[misc]
        await self.client.zadd("glimmer:apis", {api: 0})
        for job in jobs:
            await self.client.hset(f"glimmer:job:{job.id}", "submitted_at", 0)  # type: ignore[misc]

    # --- engines ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.can_claim)
    @rule(engine=ENGINES, free=CAPACITIES, known_format=st.sampled_from([1, 1, 2]), stage=STAGES)
    def claim(self, engine: str, free: FreeCapacity, known_format: int, stage: Stage):
        """Claim without a confirmation, as if the reply was lost."""
        self._claim(engine, free, known_format, stage=stage)

    @precondition(lambda self: self.model.can_claim)
    @rule(engine=ENGINES, free=CAPACITIES, stage=STAGES)
    def claim_and_confirm(self, engine: str, free: FreeCapacity, stage: Stage):
        if self._claim(engine, free, stage=stage):
            _, job, claim = self.claims[-1]
            assert self.run(self.queue.renew(engine, [claim])) == []
            job.confirm()

    @precondition(lambda self: self.model.can_claim)
    @rule(engine=ENGINES, steps=st.lists(st.sampled_from([None, 0, 1, 1, 2]), min_size=1, max_size=3), stage=STAGES)
    def die_repeatedly(self, engine: str, steps: list[int | None], stage: Stage):
        """Let an idle engine die with what it gets, at a step or before the first report."""
        for step in steps:
            if not self._claim(engine, IDLE, stage=stage):
                return
            _, job, claim = self.claims[-1]
            assert self.run(self.queue.renew(engine, [claim])) == []
            job.confirm()
            if step is not None:
                self._progress(job, claim, step)
            self._crash(engine, blame=True)

    @precondition(lambda self: self.attempts)
    @rule(engine=ENGINES, free=CAPACITIES)
    def claim_again(self, engine: str, free: FreeCapacity):
        """Repeat an attempt."""
        if engine not in self.attempts:
            return
        attempt, job, claim = self.attempts[engine]
        if job.state != "running" or job.epoch != claim.epoch:
            self._claim(engine, free, attempt=attempt)
            return
        granted = self.run(self.queue.attempt_claim(engine, free, attempt))
        assert granted is not None
        repeated = (granted.job_id, granted.epoch, granted.runs, granted.quarantined, granted.plans)
        assert repeated == (claim.job_id, claim.epoch, claim.runs, claim.quarantined, job.plans)
        job.lapsed = False
        self.touched = [job]

    def _claim(
        self, engine: str, free: FreeCapacity, known_format: int = 1, attempt: str = "", stage: Stage = "all"
    ) -> bool:
        attempt = attempt or f"attempt-{len(self.claims)}-{self.submits}"
        self.queue.known_format, self.queue.stage = known_format, stage
        granted = self.run(self.queue.attempt_claim(engine, free, attempt))
        job = self.model.claim(free, known_format, stage)
        self.touched = self.model.cleared
        if job is None:
            assert granted is None
            return False
        self.model.grant(job, engine, stage)
        assert granted is not None
        assert (granted.job_id, granted.epoch, granted.runs) == (job.id, job.epoch, job.runs + 1)
        assert (granted.quarantined, granted.plans) == (job.alone, job.plans)
        assert granted.handed_over == (HANDED_OVER if job.stage == "render" else None)
        self.claims.append((engine, job, granted))
        self.attempts[engine] = attempt, job, granted
        self.touched = [job, *self.model.cleared]
        return True

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT, what=st.sampled_from(["lease", "all leases", "deadline"]))
    def time_passes(self, back: int, what: str):
        running = [job for job in self.model.jobs if job.state == "running"]
        self.touched = running if what == "all leases" else [running[-1 - back % len(running)]]
        for job in self.touched:
            if what == "deadline":
                self._pass_deadline(job)
            else:
                self._pass_lease(job)

    def _pass_deadline(self, job: Job):
        self.run(pass_deadline(self.queue, job.id))
        job.late = True

    def _pass_lease(self, job: Job):
        self.run(self._lapse(job))
        job.lapsed = True

    async def _lapse(self, job: Job):
        queue, entry = f"glimmer:queue:{job.queue}", await self._entry(job)
        await self.client.xclaim(queue, "engines", job.engine or "", 0, [entry], idle=LEASE_MS + 1, justid=True)

    async def _entry(self, job: Job) -> Any:
        return await self.client.hget(f"glimmer:job:{job.id}", "entry")  # type: ignore[misc]

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT, index=st.integers(0, 2))
    def write(self, back: int, index: int):
        _, job, claim, holds = self._claim_back(back)
        assert self._progress(job, claim, index) == holds
        plan, partial = Plan(1, 1, [claim.epoch]), PartialImage(index, 0, b"x", {})
        assert self.run(self.queue.checkpoint_plan(claim, index, plan)) == holds
        assert self.run(self.queue.partial_image(claim, partial)) == holds
        if holds:
            job.plans[index] = plan
            job.partials.add(f"{index}:0")

    @precondition(lambda self: self.model.count("running"))
    @rule(
        backs=st.lists(RECENT, min_size=1, max_size=3, unique=True),
        by_itself=st.sampled_from([True, True, False]),
        when=st.sampled_from(["in time", "at the last moment", "too late"]),
    )
    def renew(self, backs: list[int], by_itself: bool, when: str):
        chosen = {id(self._claim_back(back)[2]): self._claim_back(back) for back in backs}.values()
        engine, first, _, holds = next(iter(chosen))
        if holds and when == "at the last moment":
            self._pass_lease(first)
        elif holds and when == "too late":
            self._pass_deadline(first)
        engine = engine if by_itself else "engine-3"
        lost: list[Claim] = []
        for holder, job, claim, holds in chosen:
            if holds and holder == engine and not job.late and not self.model.is_orphan(job):
                job.confirm()
                continue
            lost.append(claim)
            if holds and holder == engine:
                self.model.end(job, "expired" if job.late else "cancelled")
            elif job.live:
                job.absolve(claim.epoch, engine)
        assert self.run(self.queue.renew(engine, [claim for _, _, claim, _ in chosen])) == lost
        self.touched = [job for _, job, _, _ in chosen]

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT, how=st.sampled_from(["succeeded", "failed"]))
    def end(self, back: int, how: str):
        _, job, claim, holds = self._claim_back(back)
        call = self.queue.commit(claim, RESULT) if how == "succeeded" else self.queue.fail(claim, JobError("no"))
        assert self.run(call) == holds
        if holds:
            self.model.end(job, how)
            job.has_result = how == "succeeded"

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT)
    def requeue(self, back: int):
        engine, job, claim, holds = self._claim_back(back)
        assert not self.run(self.queue.requeue("engine-3", claim)), "only its engine can"
        assert self.run(self.queue.requeue(engine, claim)) == holds
        if holds:
            self.model.requeue(job)
            job.runs -= job.confirmed

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT, plans=st.sets(st.integers(0, 2)))
    def hand_over(self, back: int, plans: set[int]):
        engine, job, claim, holds = self._claim_back(back)
        kept = {index: Plan(1, 1, [claim.epoch]) for index in plans}
        call = self.queue.hand_over
        assert not self.run(call("engine-3", claim, kept, 3, HANDED_OVER.sources)), "only its engine can"
        holds = holds and job.stage == "plan"
        assert self.run(call(engine, claim, kept, 3, HANDED_OVER.sources)) == holds
        if holds:
            job.plans |= kept
            self.model.hand_over(job)

    def _claim_back(self, back: int) -> tuple[str, Job, Claim, bool]:
        """Return a recent claim, mostly one that holds, and whether it does."""

        def holds(job: Job, claim: Claim) -> bool:
            return job.state == "running" and job.epoch == claim.epoch

        good = [claimed for claimed in self.claims if holds(*claimed[1:])]
        stale = [claimed for claimed in self.claims if not holds(*claimed[1:])]
        chosen = (stale or good) if back == 3 else (good or stale)
        engine, job, claim = chosen[-1 - back % len(chosen)]
        self.touched = [job]
        return engine, job, claim, holds(job, claim)

    @precondition(lambda self: self.model.count("running"))
    @rule(back=RECENT, blame=st.booleans())
    def crash(self, back: int, blame: bool):
        running = [job for job in self.model.jobs if job.state == "running"]
        engine = running[-1 - back % len(running)].engine
        assert engine is not None
        self._crash(engine, blame)

    def _progress(self, job: Job, claim: Claim, index: int) -> bool:
        progress = {"phase": ("planning", "rendering")[index % 2], "step": 4 * index, "steps": 10}
        written = self.run(self.queue.progress(claim, progress))
        if written:
            job.progress = dict(progress)
        return written

    def _crash(self, engine: str, blame: bool):
        lost = [job for job in self.model.jobs if job.state == "running" and job.engine == engine]
        assert self.run(self.queue.requeue_all(engine, blame)) == len(lost)
        for job in lost:
            job.surrender(blame=blame)
            self.model.requeue(job)
        forgiven = [] if blame else [job for job in self.model.jobs if job.live and job.forgive(engine)]
        self.touched = lost + forgiven

    # --- always -------------------------------------------------------------------------------------------------

    @invariant()
    def redis_agrees(self):
        self.run(self._check_counts())
        for job in self.touched:
            self.run(self._check_job(job))
        self.touched = []

    async def _check_counts(self):
        model = self.model
        counts = QueueStats(model.count("queued"), model.count("running"), model.sources, model.dead_lettered)
        stats = await self.queue.stats()
        live = [job for job in model.jobs if job.live]
        to_plan = sum(job.stage == "plan" for job in live)
        assert stats == counts
        assert (stats.to_plan, stats.to_render) == (to_plan, len(live) - to_plan)
        async with self.client.pipeline(transaction=False) as pipe:
            for queue in model.streams:
                pipe.xrange(f"glimmer:queue:{queue}")
                pipe.xpending(f"glimmer:queue:{queue}", "engines")
            pipe.smembers("glimmer:owned:anna")
            pipe.smembers("glimmer:owned:bob")
            *streams, annas, bobs = await pipe.execute(raise_on_error=False)
        for entries, group, jobs in zip(streams[::2], streams[1::2], model.streams.values(), strict=True):
            assert [fields[b"job"].decode() for _, fields in entries] == [job.id for job in jobs]
            pending = 0 if isinstance(group, ResponseError) else group["pending"]  # the first claim makes the group
            assert pending == sum(job.delivered for job in jobs)
        assert {name.decode() for name in annas} == model.owned("anna")
        assert {name.decode() for name in bobs} == model.owned("bob")

        await self._check_kept()

    async def _check_kept(self):
        """Check that every job is counted once: an ended one with what it has left, a live one with its sources."""
        kept: Any = await self.client.hgetall("glimmer:counters:kept")  # type: ignore[misc]
        entries = {job_id.decode(): value.decode().split(" ") for job_id, value in kept.items()}
        assert entries.keys() == {job.id for job in self.model.jobs}
        total: Any = await self.client.hgetall("glimmer:counters:kept_total")  # type: ignore[misc]
        assert int(total.get(b"bytes", 0)) == sum(int(size) for size, *_ in entries.values())
        for owner in ("anna", "bob"):
            sizes = [(int(size), int(sources)) for size, sources, _, name in entries.values() if name == owner]
            assert int(total.get(b"bytes:%b" % owner.encode(), 0)) == sum(size for size, _ in sizes)
            assert int(total.get(b"sources:%b" % owner.encode(), 0)) == sum(sources for _, sources in sizes)
        for job in self.touched:
            size, sources, *_ = entries[job.id]
            assert int(sources) == (job.sources if job.live else 0)
            if not job.live:
                names = (f"glimmer:{name}:{job.id}" for name in ("job", "result", "partials"))
                left = [await self.client.memory_usage(name, samples=0) or 0 for name in names]
                assert int(size) == sum(left) + 1024
            elif job.state == "queued":
                assert int(size) > 64 * 64 * 3 * job.images

    async def _check_job(self, job: Job):
        """Check the record and the keys beside it, which have no TTL for live jobs only."""
        record, result = await self.queue.get(job.id), await self.queue.result(job.id)
        assert record is not None
        before = [other for other in self.model.jobs if other.state == "queued"]
        assert record.position == (before.index(job) if job.state == "queued" else None)
        assert (record.state, record.runs, record.owner) == (job.state, job.runs, job.owner)
        assert not job.live or record.progress == job.progress
        assert (record.error is not None) == (job.state == "failed")
        assert result == (RESULT if job.has_result else None)
        deaths = [name async for name, _ in self.client.hscan_iter(f"glimmer:job:{job.id}", match="death:*")]
        assert not job.live or set(deaths) == {b"death:%d" % epoch for epoch in job.deaths}
        if job.live and job.delivered:
            queue, entry = f"glimmer:queue:{job.queue}", await self._entry(job)
            lease: Any
            [lease] = await self.client.xpending_range(queue, "engines", entry, entry, 1)
            assert lease["consumer"].decode() == (job.engine or "handed-back")
            assert (lease["time_since_delivered"] > LEASE_MS) == job.lapsed
        names = ("job", "result", "partials", "plans", "sources")
        async with self.client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hlen(f"glimmer:{name}:{job.id}")
                pipe.pttl(f"glimmer:{name}:{job.id}")
            found: list[int] = await pipe.execute()
        held, lives = dict(zip(names, found[::2], strict=True)), dict(zip(names, found[1::2], strict=True))
        assert held["plans"] == (len(job.plans) + (job.stage == "render") if job.live else 0)
        assert held["sources"] == (1 if job.live and job.sources else 0)
        assert held["partials"] == 2 * len(job.partials)
        for name in names:
            assert not held[name] or (lives[name] == -1) == job.live, f"how long {name} lives"


@pytest.mark.timeout(600)  # a failure takes Hypothesis up to five minutes to make small
def test_any_order_of_calls_keeps_the_queue_right(redis_server: EmbeddedRedis):
    QueueMachine.server = redis_server
    run_state_machine_as_test(QueueMachine, settings=SIZES)
