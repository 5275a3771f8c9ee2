"""How many requests a second get through keys, limits, validation and queue, and how long each takes.

    python -m benchmarks.admission                      one API process, closed loop and 1,000 requests/s
    python -m benchmarks.admission --apis 2 --max-queue 256

The API is `glimmer api` as anybody would run it, Redis a real one that syncs every write to its disk. No engine works:
one only says that it is ready, so that jobs are accepted and stay in the queue. Clients with keep-alive connections
post generations with `Prefer: respond-async`, each with a prompt of its own. They use ten keys, all with limits; one in
ten requests comes with a key whose limit is soon reached, so that refusals (429) are measured, too, apart from the
rest. Failed is what got a 503.

Two kinds of load. Closed loop: every connection sends its next request when it has the answer to its last; the rate is
what the server can do, the latency follows from the number of connections. Open loop: requests are due at a fixed rate,
whether the server keeps up or not; the latency counts from when a request was due, so that a stall is not left out.

Told are answers a second, p50 and p99 of both kinds of answers in milliseconds, and the processor time that one request
costs the API and Redis, which says more than the rate where the machine is shared.
"""

import argparse
import asyncio
import itertools
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.api_process import ApiProcess
from benchmarks.quantile import quantile
from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.consumer import JobConsumer
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import EngineInfo
from server.admission.keys import hash_key, new_key

PATH = "/v1/images/generations"
ACCEPTED, REFUSED, FAILED = 202, 429, 503
ROOMY = {"max_concurrent": 10**9, "requests_per_minute": 100_000, "pixel_steps_per_day": 2**53 - 1}
NARROW = {**ROOMY, "requests_per_minute": 60}
ROOMY_KEYS = 9
HEARTBEAT_S, HEARTBEAT_TTL_S = 1.0, 5.0
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """
    Args:
        seconds: of each load, after `warm_up` seconds that are not counted.
        rates: of the loads, in requests a second; None is a closed loop.
    """

    connections: int = 32
    seconds: float = 8.0
    warm_up: float = 2.0
    rates: Sequence[float | None] = (None, 1000.0)
    apis: int = 1
    max_queue: int = 10**6


@dataclass
class Load:
    """What came of one load.

    Args:
        rate: see `Plan`.
        seconds: how long it took.
        latencies: in seconds, by HTTP status.
        api_s, redis_s: processor time of all API processes and of Redis; 0 where the system does not tell.
    """

    rate: float | None
    seconds: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=lambda: {ACCEPTED: [], REFUSED: [], FAILED: []})
    api_s: float = 0.0
    redis_s: float = 0.0

    @property
    def label(self) -> str:
        return "closed loop" if self.rate is None else f"open loop, {self.rate:g}/s"

    @property
    def answers(self) -> int:
        return sum(map(len, self.latencies.values()))


# --- the server -------------------------------------------------------------------------------------------------------


def write_keys(path: Path) -> list[str]:
    """Makes the keys that are sent in turn, and the file that the API knows them by."""
    limits = [*[ROOMY] * ROOMY_KEYS, NARROW]
    keys = [new_key() for _ in limits]
    tables = []
    for number, (key, its) in enumerate(zip(keys, limits, strict=True)):
        tables += [f"[key-{number}]", f'sha256 = "{hash_key(key).hex()}"', *(f"{name} = {its[name]}" for name in its)]
    path.write_text("\n".join(tables) + "\n")
    return keys


@contextmanager
def running_api(redis_url: str, keys: Path, max_queue: int, log: Path) -> Iterator[ApiProcess]:
    """Run a `glimmer api` that listens; kill it at the end.

    Raises:
        RuntimeError: it did not start; the message is its log.
    """
    process = ApiProcess({"redis-url": redis_url, "max-queue": max_queue, "api-keys": keys}, log)
    try:
        start_deadline = time.monotonic() + START_TIMEOUT_S
        while not process.listens():
            if time.monotonic() > start_deadline:
                raise RuntimeError(f"glimmer api did not start: {log.read_text()}")
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


@asynccontextmanager
async def ready_engine(redis_url: str) -> AsyncIterator[None]:
    """An engine that says it is ready and takes nothing."""
    client = connect(redis_url)
    queue = JobConsumer(client)
    info = EngineInfo("benchmark", os.getpid(), "all", "ready", "benchmark", "1024x1024", 16384, 2048)

    async def beat() -> None:
        while True:
            with suppress(QueueUnavailable):
                await queue.heartbeat(info, "", HEARTBEAT_TTL_S)
            await asyncio.sleep(HEARTBEAT_S)

    await queue.heartbeat(info, "", HEARTBEAT_TTL_S)
    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])
        await queue.close()
        await client.aclose()


def processor_seconds(pid: int) -> float:
    """What a process has used so far; 0 where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the clients ------------------------------------------------------------------------------------------------------


class Connection:
    """A keep-alive connection that does no more than it must: an HTTP library would take longer than the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def post(self, key: str, prompt: str) -> int:
        """Sends one generation and returns the status of its answer.

        Raises:
            RuntimeError: it is none of those that are counted.
        """
        body = orjson.dumps({"prompt": prompt, "size": "1024x1024", "seed": 1})
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nPrefer: respond-async\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", answer)
        content = await self._reader.readexactly(int(length[1])) if length else b""
        status = int(answer[9:12])
        if status not in (ACCEPTED, REFUSED, FAILED):
            raise RuntimeError(f"the API answered {status}: {content.decode(errors='replace')}")
        return status

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class Clients:
    """Connections to all APIs in turn, and the requests they send."""

    def __init__(self, connections: Sequence[Connection], keys: Sequence[str]):
        self._connections = connections
        self._keys = itertools.cycle(keys)
        self._numbers = itertools.count()
        self._run = secrets.token_hex(4)

    async def load(self, rate: float | None, seconds: float) -> Load:
        """Sends requests for so long, and waits for the last answers."""
        load = Load(rate)
        began = time.perf_counter()
        due_times = _now_until(began + seconds) if rate is None else _every(1 / rate, began, began + seconds)

        async def send(connection: Connection) -> None:
            for due in due_times:  # shared by all: whichever connection is free takes the next
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                await self._send(connection, due, load)

        async with asyncio.TaskGroup() as group:
            for connection in self._connections:
                group.create_task(send(connection))
        load.seconds = time.perf_counter() - began
        return load

    async def _send(self, connection: Connection, since: float, load: Load) -> None:
        status = await connection.post(next(self._keys), f"a poster, number {next(self._numbers)} of {self._run}")
        load.latencies[status].append(time.perf_counter() - since)


def _now_until(end: float) -> Iterator[float]:
    while (now := time.perf_counter()) < end:
        yield now


def _every(interval: float, began: float, end: float) -> Iterator[float]:
    yield from itertools.takewhile(lambda due: due < end, (began + number * interval for number in itertools.count()))


@asynccontextmanager
async def connected(apis: Sequence[ApiProcess], count: int, keys: Sequence[str]) -> AsyncIterator[Clients]:
    connections = [
        Connection(*await asyncio.open_connection("127.0.0.1", urlsplit(api.url).port))
        for api in itertools.islice(itertools.cycle(apis), count)
    ]
    try:
        yield Clients(connections, keys)
    finally:
        for connection in connections:
            await connection.close()


# --- the measurement --------------------------------------------------------------------------------------------------


async def measure(apis: Sequence[ApiProcess], redis: EmbeddedRedis, keys: Sequence[str], plan: Plan) -> list[Load]:
    """The loads of the plan, one after the other."""
    loads = []
    async with ready_engine(redis.url), connected(apis, plan.connections, keys) as clients:
        await clients.load(None, plan.warm_up)
        for rate in plan.rates:
            before = [processor_seconds(process.pid) for process in (*apis, redis)]
            load = await clients.load(rate, plan.seconds)
            after = [processor_seconds(process.pid) for process in (*apis, redis)]
            *of_apis, load.redis_s = (now - then for now, then in zip(after, before, strict=True))
            load.api_s = sum(of_apis)
            loads.append(load)
    return loads


def print_table(loads: Sequence[Load], plan: Plan) -> None:
    processes = "1 API process" if plan.apis == 1 else f"{plan.apis} API processes"
    table = Table(title=f"{processes}, {plan.connections} connections, at most {plan.max_queue} jobs waiting")
    columns = (
        "answers/s",
        "accepted",
        "p50 ms",
        "p99 ms",
        "refused",
        "p50 ms",
        "p99 ms",
        "failed",
        "API ms",
        "Redis ms",
    )
    for heading in ("", *columns):
        table.add_column(heading, justify="left" if not heading else "right")
    for load in loads:
        answers: list[str] = []
        for status in (ACCEPTED, REFUSED):
            latencies = load.latencies[status]
            answers += [str(len(latencies)), _milliseconds(latencies, 0.5), _milliseconds(latencies, 0.99)]
        answers.append(str(len(load.latencies[FAILED])))
        costs = [f"{1e3 * seconds / load.answers:.2f}" if seconds else "" for seconds in (load.api_s, load.redis_s)]
        table.add_row(load.label, f"{load.answers / load.seconds:.0f}", *answers, *costs)
    Console(width=120).print(table)


def _milliseconds(latencies: Sequence[float], share: float) -> str:
    return f"{1e3 * quantile(latencies, share):.1f}" if latencies else ""


def run(plan: Plan) -> list[Load]:
    """Starts everything, measures, prints the table and stops everything. Only in the main thread, as `EmbeddedRedis`
    asks."""
    with tempfile.TemporaryDirectory(prefix="glimmer-") as name, ExitStack() as stack:
        folder = Path(name)
        keys = write_keys(folder / "keys.toml")
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        apis = [
            stack.enter_context(running_api(redis.url, folder / "keys.toml", plan.max_queue, folder / f"api-{i}.log"))
            for i in range(plan.apis)
        ]
        loads = asyncio.run(measure(apis, redis, keys, plan))
    print_table(loads, plan)
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apis", type=int, default=Plan.apis, help="API processes")
    parser.add_argument("--connections", type=int, default=Plan.connections)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each load")
    parser.add_argument("--warm-up", type=float, default=Plan.warm_up, help="seconds before the first load")
    parser.add_argument("--rates", type=float, nargs="*", default=[1000.0], help="requests a second of the open loops")
    parser.add_argument("--max-queue", type=int, default=Plan.max_queue, help="jobs that may wait")
    arguments = parser.parse_args()
    run(Plan(**{**vars(arguments), "rates": (None, *arguments.rates)}))


if __name__ == "__main__":
    main()
