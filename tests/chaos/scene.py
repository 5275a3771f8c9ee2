"""The processes of a scenario, its clients and their ledger, and the checks after every scenario."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import orjson

from engine.jobs.events import Subscription
from engine.jobs.job import TERMINAL_STATES
from tests.chaos.cases import Case
from tests.chaos.clients import BROKEN, Clients, Load
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Faults
from tests.chaos.ledger import Ledger, quantile
from tests.chaos.processes import Stack, StackSettings
from tests.chaos.redis_contents import RedisContents
from tests.chaos.report import Report
from tests.waiting import until

SETTLE_S = 30.0  # in which the queue has to become empty without clients
DELIVERED_S = 6.0  # after which a delivered result has expired


class Announcements:
    """Counts the announced ends of each job."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()

    def read(self, message: bytes) -> None:
        event = orjson.loads(message)
        if event.get("state") in TERMINAL_STATES:
            self.ends[event["job"]] += 1


@dataclass
class Scene:
    """The state of a running scenario.

    Args:
        restarts_apis: APIs end while clients use them.
        fatal: number of jobs that have to be given up.
        forgets: Redis may lose the latest writes of engines, which then happen again.
    """

    stack: Stack
    report: Report
    rng: Random
    ledger: Ledger = field(default_factory=Ledger)
    announced: Announcements = field(default_factory=Announcements)
    restarts_apis: bool = False
    fatal: int = 0
    forgets: bool = False

    def __post_init__(self) -> None:
        self.clients = Clients(lambda: self.stack.urls, self.ledger, key=self.stack.settings.key)
        self.faults = Faults(self.stack, self.rng)

    @asynccontextmanager
    async def load(self, cases: Iterator[Case], concurrency: int, max_cases: int | None = None) -> AsyncIterator[Load]:
        """Run clients during the block; at its end, wait for the requests in flight."""
        load = Load(self.clients, cases, concurrency, max_cases)
        running = asyncio.create_task(load.run())
        try:
            yield load
        except BaseException:
            running.cancel()
            raise
        if max_cases is None:
            load.stop()
        await running

    async def metric(self, name: str) -> float:
        """Return the sum of a metric over all its samples, from the first API."""
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(f"{self.stack.urls[0]}/metrics")).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        )


@asynccontextmanager
async def open_scene(name: str, folder: Path, seed: int, settings: StackSettings) -> AsyncIterator[Scene]:
    """Start the processes of one scenario; at the end, drain them and judge what always has to hold."""
    report = Report(name)
    async with Stack(folder, settings) as stack:
        scene = Scene(stack, report, Random(seed))
        subscription = Subscription(
            stack.client, stack.queue.key("events"), on_message=scene.announced.read, on_open=lambda: None
        )
        subscription.start()
        try:
            yield scene
            contents = await _wait_until_idle(scene)
        finally:
            await subscription.close()
            await scene.clients.close()
        used = await _kv_blocks_used(scene)
        given_up = (await stack.queue.stats()).dead_lettered
        report.check("jobs given up", given_up, f"{scene.fatal}", given_up == scene.fatal)
        await stack.stop()
        judge(scene, contents, used, Evidence.read(folder))


async def _wait_until_idle(scene: Scene) -> RedisContents:
    """Return the contents of Redis when the queue is empty, after `SETTLE_S` at most."""

    async def is_settled() -> bool:
        await scene.stack.queue.engines()  # whoever asks has the dead forgotten
        contents = await RedisContents.read(scene.stack.client)
        return contents.is_idle and contents.consumers <= {engine.id for engine in scene.stack.engines}

    with suppress(TimeoutError):
        await until(is_settled, SETTLE_S)
    return await RedisContents.read(scene.stack.client)


async def _kv_blocks_used(scene: Scene) -> float:
    """Return the KV blocks in use from the engines' heartbeats, 0 or their number after `SETTLE_S`."""

    async def are_free() -> bool:
        return not await scene.metric("glimmer_kv_blocks_used")

    with suppress(TimeoutError):
        await until(are_free, SETTLE_S)
    return await scene.metric("glimmer_kv_blocks_used")


def judge(scene: Scene, contents: RedisContents, kv_blocks_used: float, evidence: Evidence) -> None:
    """Judge what has to hold after any faults."""
    report, ledger = scene.report, scene.ledger
    _judge_clients(report, ledger)
    _judge_connections(report, ledger, evidence, restarts_apis=scene.restarts_apis)
    _judge_writes(scene, evidence)
    twins = [entry.case for entry in ledger.entries if entry.case.kind == "twins"]
    posts = f"{len(twins)} in {sum(case.copies for case in twins)} posts"
    report.note("idempotency keys", posts)
    report.check_none(
        "of these with two jobs", [case.prompt for case in twins if len(evidence.jobs_of(case.prompt)) > 1]
    )
    living = {engine.id for engine in scene.stack.engines}
    _judge_contents(report, contents, living, kv_blocks_used)
    report.check("exit codes after SIGTERM", scene.stack.exit_codes, "all 0", not any(scene.stack.exit_codes))
    report.check_none(
        "engines that leaked", [f"{engine}: {left}" for engine, left in evidence.integrity.items() if left]
    )


def _judge_writes(scene: Scene, evidence: Evidence) -> None:
    """Judge the writes of engines; a Redis that forgets some only has to end with all jobs ended."""
    report = scene.report
    twice = {job for job, ends in scene.announced.ends.items() if ends > 1} | set(evidence.ended_twice())
    if scene.forgets:
        report.note("jobs that ended again, after their end was forgotten", len(twice))
        return
    report.check_none("jobs with two ends", twice)
    stale = [f"{write.job} {write.kind}" for write in evidence.stale(accepted=True)]
    report.check_none("stale writes that took effect", stale)
    report.check_none("images planned again though their plan was kept", evidence.planned_again())
    report.check_none("suspects that did not run alone", evidence.quarantined_in_company())


def _judge_clients(report: Report, ledger: Ledger) -> None:
    outcomes = Counter("failed" if entry.failed else entry.outcome for entry in ledger.entries)
    report.note("cases", f"{len(ledger.entries)} ({', '.join(f'{n} {o}' for o, n in outcomes.most_common())})")
    latencies = ledger.latencies()
    report.note("latency p50, p99, max s", ", ".join(f"{quantile(latencies, q):.2f}" for q in (0.5, 0.99, 1)))
    if retries := ledger.retries:
        report.note("retries", ", ".join(f"{count} x {reason}" for reason, count in retries.most_common()))
    failures = [f"case {e.case.number} ({e.case.kind}): {e.outcome}" for e in ledger.failed]
    report.check_none("acknowledged jobs lost", [str(e.job_id) for e in ledger.failed if e.job_id])
    report.check_none("failed clients", failures)


def _judge_connections(report: Report, ledger: Ledger, evidence: Evidence, *, restarts_apis: bool) -> None:
    """Judge broken connections: an API that ends may break one while a request arrives, but not once it is accepted."""
    broken = [entry.case.prompt for entry in ledger.entries if entry.retries[BROKEN]]
    if not restarts_apis:
        report.check_none("connections broken before a response", broken)
    report.check_none(
        "of these after the request was accepted", [prompt for prompt in broken if len(evidence.jobs_of(prompt)) > 1]
    )


def _judge_contents(report: Report, contents: RedisContents, living: set[str], kv_blocks_used: float) -> None:
    queue = f"{contents.waiting} {contents.running} {contents.entries} {contents.pending}"
    report.check("left: waiting, running, XLEN, pending", queue, "0 0 0 0", contents.is_idle)
    unfinished = {kind: contents.kinds[kind] for kind in ("plans", "sources", "owned") if contents.kinds[kind]}
    report.check("left: plans and sources of jobs", unfinished or "0", "0", not unfinished)
    report.check_none("left: keys without an end", contents.without_end)
    report.check_none("left: names of dead engines", contents.consumers - living)
    report.check("left: KV blocks in use", kv_blocks_used, "0", not kv_blocks_used)
