"""Measure how many requests per second pass keys, limits, validation and the queue, and their latency.

    python -m benchmarks.admission                      one API process, closed loop and 1,000 requests/s
    python -m benchmarks.admission --apis 2 --max-queue 256

Real `glimmer api` processes and a Redis that syncs every write to its disk. No engine runs: a heartbeat says that one
is ready, so that jobs are accepted and stay queued. Keep-alive connections post generations with
`Prefer: respond-async`, each with a different prompt, with ten keys in turn; one soon reaches its limit, so that
refusals are measured, too.

Closed loop: each connection sends its next request after the response to its last; the rate is the server's maximum,
the latency follows from the number of connections. Open loop: requests are due at a fixed rate; latency counts from
then, so that stalls are included.

Per loop the table has responses per second; number, p50 and p99 of accepted (202) and refused (429) requests; the
number of failed ones (503); CPU time per request of API and Redis, which means more than the rate on a shared machine.
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
HIGH_LIMITS = {"max_concurrent": 10**9, "requests_per_minute": 100_000, "pixel_steps_per_day": 2**53 - 1}
LOW_LIMITS = {**HIGH_LIMITS, "requests_per_minute": 60}
HIGH_LIMIT_KEYS = 9
HEARTBEAT_S, HEARTBEAT_TTL_S = 1.0, 5.0
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LoadProfile:
    """The loads of one run: `seconds` each, after `warm_up` seconds that are not counted."""

    connections: int = 32
    seconds: float = 8.0
    warm_up: float = 2.0
    rates: Sequence[float | None] = (None, 1000.0)  # requests per second; None is a closed loop
    apis: int = 1
    max_queue: int = 10**6


@dataclass
class LoadResult:
    """The measurements of one load; latencies in seconds, by HTTP status."""

    rate: float | None
    seconds: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=lambda: {ACCEPTED: [], REFUSED: [], FAILED: []})
    api_s: float = 0.0  # CPU time of all API processes; 0 if the system has no /proc
    redis_s: float = 0.0

    @property
    def label(self) -> str:
        return "closed loop" if self.rate is None else f"open loop, {self.rate:g}/s"

    @property
    def responses(self) -> int:
        return sum(map(len, self.latencies.values()))


# --- the server -------------------------------------------------------------------------------------------------------


def write_keys(path: Path) -> list[str]:
    """Write the API's key file and return the keys, to be used in turn."""
    limits = [*[HIGH_LIMITS] * HIGH_LIMIT_KEYS, LOW_LIMITS]
    keys = [new_key() for _ in limits]
    tables = []
    for number, (key, key_limits) in enumerate(zip(keys, limits, strict=True)):
        lines = (f"{name} = {limit}" for name, limit in key_limits.items())
        tables += [f"[key-{number}]", f'sha256 = "{hash_key(key).hex()}"', *lines]
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
    """Send the heartbeats of a ready engine that takes no jobs."""
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


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the clients ------------------------------------------------------------------------------------------------------


class Connection:
    """A minimal keep-alive connection: an HTTP library would take longer than the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def post(self, key: str, prompt: str) -> int:
        """Send one generation and return the HTTP status.

        Raises:
            RuntimeError: it is not 202, 429 or 503.
        """
        body = orjson.dumps({"prompt": prompt, "size": "1024x1024", "seed": 1})
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nPrefer: respond-async\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        response = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", response)
        content = await self._reader.readexactly(int(length[1])) if length else b""
        status = int(response[9:12])
        if status not in (ACCEPTED, REFUSED, FAILED):
            raise RuntimeError(f"unexpected status {status}: {content.decode(errors='replace')}")
        return status

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class Clients:
    """Connections to all APIs in turn, and the requests sent on them."""

    def __init__(self, connections: Sequence[Connection], keys: Sequence[str]):
        self._connections = connections
        self._keys = itertools.cycle(keys)
        self._numbers = itertools.count()
        self._run = secrets.token_hex(4)

    async def load(self, rate: float | None, seconds: float) -> LoadResult:
        """Send requests for `seconds`, then wait for the last responses."""
        result = LoadResult(rate)
        began = time.perf_counter()
        due_times = _now_until(began + seconds) if rate is None else _every(1 / rate, began, began + seconds)

        async def send(connection: Connection) -> None:
            for due in due_times:  # shared by all connections
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                await self._send(connection, due, result)

        async with asyncio.TaskGroup() as group:
            for connection in self._connections:
                group.create_task(send(connection))
        result.seconds = time.perf_counter() - began
        return result

    async def _send(self, connection: Connection, since: float, result: LoadResult) -> None:
        status = await connection.post(next(self._keys), f"a poster, number {next(self._numbers)} of {self._run}")
        result.latencies[status].append(time.perf_counter() - since)


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


async def measure(
    apis: Sequence[ApiProcess], redis: EmbeddedRedis, keys: Sequence[str], profile: LoadProfile
) -> list[LoadResult]:
    """Run the profile's loads one after the other."""
    results = []
    async with ready_engine(redis.url), connected(apis, profile.connections, keys) as clients:
        await clients.load(None, profile.warm_up)
        for rate in profile.rates:
            before = [cpu_seconds(process.pid) for process in (*apis, redis)]
            result = await clients.load(rate, profile.seconds)
            after = [cpu_seconds(process.pid) for process in (*apis, redis)]
            *api_seconds, result.redis_s = (now - then for now, then in zip(after, before, strict=True))
            result.api_s = sum(api_seconds)
            results.append(result)
    return results


def print_table(results: Sequence[LoadResult], profile: LoadProfile) -> None:
    processes = "1 API process" if profile.apis == 1 else f"{profile.apis} API processes"
    table = Table(title=f"{processes}, {profile.connections} connections, at most {profile.max_queue} jobs waiting")
    latency = ("p50 ms", "p99 ms")
    columns = ("responses/s", "accepted", *latency, "refused", *latency, "failed", "API ms", "Redis ms")
    for heading in ("", *columns):
        table.add_column(heading, justify="left" if not heading else "right")
    for result in results:
        cells = [result.label, f"{result.responses / result.seconds:.0f}"]
        for status in (ACCEPTED, REFUSED):
            latencies = result.latencies[status]
            cells += [str(len(latencies)), _milliseconds(latencies, 0.5), _milliseconds(latencies, 0.99)]
        cells.append(str(len(result.latencies[FAILED])))
        cells += [f"{1e3 * cpu_s / result.responses:.2f}" if cpu_s else "" for cpu_s in (result.api_s, result.redis_s)]
        table.add_row(*cells)
    Console(width=120).print(table)


def _milliseconds(latencies: Sequence[float], share: float) -> str:
    return f"{1e3 * quantile(latencies, share):.1f}" if latencies else ""


def run(profile: LoadProfile) -> list[LoadResult]:
    """Measure and print the table. Only in the main thread, see `EmbeddedRedis`."""
    with tempfile.TemporaryDirectory(prefix="glimmer-") as name, ExitStack() as stack:
        folder = Path(name)
        keys = write_keys(folder / "keys.toml")
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        apis = [
            stack.enter_context(
                running_api(redis.url, folder / "keys.toml", profile.max_queue, folder / f"api-{i}.log")
            )
            for i in range(profile.apis)
        ]
        results = asyncio.run(measure(apis, redis, keys, profile))
    print_table(results, profile)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apis", type=int, default=LoadProfile.apis, help="API processes")
    parser.add_argument("--connections", type=int, default=LoadProfile.connections, help="keep-alive connections")
    parser.add_argument("--seconds", type=float, default=LoadProfile.seconds, help="duration of each load")
    parser.add_argument("--warm-up", type=float, default=LoadProfile.warm_up, help="seconds before the first load")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[1000.0], help="requests per second of the open loops"
    )
    parser.add_argument("--max-queue", type=int, default=LoadProfile.max_queue, help="maximum number of waiting jobs")
    arguments = parser.parse_args()
    run(LoadProfile(**{**vars(arguments), "rates": (None, *arguments.rates)}))


if __name__ == "__main__":
    main()
