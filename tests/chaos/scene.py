"""One stack, its clients and their ledger, and what has to hold after anything whatsoever."""

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
from tests.chaos.redis_contents import PREFIX, RedisContents
from tests.chaos.report import Report
from tests.waiting import until

SETTLE_S = 30.0  # in which a queue without clients must run empty
DELIVERED_S = 6.0  # after which a result that was handed over is gone


class Announcements:
    """How often each job's end was announced."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()

    def read(self, message: bytes) -> None:
        event = orjson.loads(message)
        if event.get("state") in TERMINAL_STATES:
            self.ends[event["job"]] += 1


@dataclass
class Scene:
    """A running stack in the middle of a scenario.

    Args:
        servers_go: APIs end while clients are there.
    """

    stack: Stack
    report: Report
    rng: Random
    ledger: Ledger = field(default_factory=Ledger)
    announced: Announcements = field(default_factory=Announcements)
    servers_go: bool = False

    def __post_init__(self) -> None:
        self.clients = Clients(lambda: self.stack.urls, self.ledger)
        self.faults = Faults(self.stack, self.rng)

    @asynccontextmanager
    async def load(self, cases: Iterator[Case], concurrency: int, most: int | None = None) -> AsyncIterator[Load]:
        """Clients at work while the block runs; what is under way then ends before it is left."""
        load = Load(self.clients, cases, concurrency, most)
        running = asyncio.create_task(load.run())
        try:
            yield load
        except BaseException:
            running.cancel()
            raise
        if most is None:
            load.enough()
        await running

    async def metric(self, name: str) -> float:
        """The sum of a metric over all its samples, as the first API tells it."""
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(f"{self.stack.urls[0]}/metrics")).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        )


@asynccontextmanager
async def scene(name: str, folder: Path, seed: int, settings: StackSettings) -> AsyncIterator[Scene]:
    """A stack for one scenario; at the end it is drained, and judged by what always has to hold."""
    report = Report(name)
    async with Stack(folder, settings) as stack:
        here = Scene(stack, report, Random(seed))
        listening = Subscription(stack.client, f"{PREFIX}:events", on_message=here.announced.read, on_open=lambda: None)
        listening.start()
        try:
            yield here
            contents = await _settled(here)
        finally:
            await listening.close()
            await here.clients.close()
        used = await _kv_blocks_used(here)
        await stack.stop()
        judge(here, contents, used, Evidence.read(folder))


async def _settled(here: Scene) -> RedisContents:
    """Redis, once its queue has run empty or should have."""

    async def is_settled() -> bool:
        await here.stack.queue.engines()  # whoever asks has the dead forgotten
        contents = await RedisContents.read(here.stack.client)
        return contents.is_idle and contents.consumers <= {engine.id for engine in here.stack.engines}

    with suppress(TimeoutError):
        await until(is_settled, SETTLE_S)
    return await RedisContents.read(here.stack.client)


async def _kv_blocks_used(here: Scene) -> float:
    """As the engines' heartbeats tell it, once they have told that nothing is in use, or should have."""

    async def nothing_is() -> bool:
        return not await here.metric("glimmer_kv_blocks_used")

    with suppress(TimeoutError):
        await until(nothing_is, SETTLE_S)
    return await here.metric("glimmer_kv_blocks_used")


def judge(here: Scene, contents: RedisContents, kv_blocks_used: float, evidence: Evidence) -> None:
    """What has to hold after any faults."""
    report, ledger = here.report, here.ledger
    _judge_clients(report, ledger)
    _judge_connections(report, ledger, evidence, servers_go=here.servers_go)
    twice = {job for job, ends in here.announced.ends.items() if ends > 1} | set(evidence.ended_twice())
    report.none("jobs with two ends", twice)
    stale = [f"{write.job} {write.kind}" for write in evidence.stale(accepted=True)]
    report.none("stale writes that took effect", stale)
    report.none("images planned again though their plan was kept", evidence.planned_again())
    report.none("suspects that did not run alone", evidence.suspects_in_company())
    twins = [entry.case for entry in ledger.entries if entry.case.kind == "twins"]
    posts = f"{len(twins)} in {sum(case.copies for case in twins)} posts"
    report.tell("idempotency keys", posts)
    report.none("of these with two jobs", [case.prompt for case in twins if len(evidence.jobs_of(case.prompt)) > 1])
    living = {engine.id for engine in here.stack.engines}
    _judge_contents(report, contents, living, kv_blocks_used)
    report.hold("exit codes after SIGTERM", here.stack.exit_codes, "all 0", not any(here.stack.exit_codes))
    report.none("engines that leaked", [f"{engine}: {left}" for engine, left in evidence.integrity.items() if left])


def _judge_clients(report: Report, ledger: Ledger) -> None:
    outcomes = Counter("failed" if entry.failed else entry.outcome for entry in ledger.entries)
    report.tell("cases", f"{len(ledger.entries)} ({', '.join(f'{n} {o}' for o, n in outcomes.most_common())})")
    latencies = ledger.latencies()
    report.tell("latency p50, p99, max s", ", ".join(f"{quantile(latencies, q):.2f}" for q in (0.5, 0.99, 1)))
    if told := ledger.told_to_retry:
        report.tell("answers to try again", ", ".join(f"{count} x {what}" for what, count in told.most_common()))
    failures = [f"case {e.case.number} ({e.case.kind}): {e.outcome}" for e in ledger.failed]
    report.none("acknowledged jobs lost", [str(e.job_id) for e in ledger.failed if e.job_id])
    report.none("clients that were failed", failures)


def _judge_connections(report: Report, ledger: Ledger, evidence: Evidence, *, servers_go: bool) -> None:
    """A server that goes may close a connection on which a request is just coming, but never on one it has taken up."""
    broken = [entry.case.prompt for entry in ledger.entries if entry.told_to_retry[BROKEN]]
    if not servers_go:
        report.none("connections broken before an answer", broken)
    report.none("of these taken up before", [prompt for prompt in broken if len(evidence.jobs_of(prompt)) > 1])


def _judge_contents(report: Report, contents: RedisContents, living: set[str], kv_blocks_used: float) -> None:
    queue = f"{contents.waiting} {contents.running} {contents.entries} {contents.pending}"
    report.hold("left: waiting, running, XLEN, pending", queue, "0 0 0 0", contents.is_idle)
    unfinished = {kind: contents.kinds[kind] for kind in ("plans", "sources", "owned") if contents.kinds[kind]}
    report.hold("left: plans and sources of jobs", unfinished or "0", "0", not unfinished)
    report.none("left: keys without an end", contents.without_end)
    report.none("left: names of dead engines", contents.consumers - living)
    report.hold("left: KV blocks in use", kv_blocks_used, "0", not kv_blocks_used)
