"""Measure how early partial images arrive and what they cost: streams with them against streams without.

    python -m benchmarks.streaming                      on a server that it starts
    python -m benchmarks.streaming --url http://...     on a running server

Rounds of the same request alternate between `partial_images` 3 and 0. The table has the median seconds until the first
partial image and until the final one, and images per second with and without partial images: their ratio is the cost in
throughput. Every request has a different seed, so that no plan comes from the plan cache.
"""

import argparse
import itertools
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from server.cli.demo import running_server

PROMPT = 'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar'
SIZES, CONCURRENCY, PARTIALS = ("256x256", "512x512"), (1, 8), 3
TIMEOUT_S = 600.0


@dataclass
class Rounds:
    """The rounds of one kind, in seconds."""

    first: list[float] = field(default_factory=list)  # until each request's first image, partial or final
    final: list[float] = field(default_factory=list)  # until its final one
    total: float = 0.0  # all rounds

    @property
    def images_per_second(self) -> float:
        return len(self.final) / self.total


def stream(url: str, size: str, seed: int, partials: int) -> tuple[float, float]:
    """Return the seconds until the first event with an image, and until the last.

    Raises:
        RuntimeError: the request failed, or the number of images is wrong.
    """
    body = {"prompt": PROMPT, "size": size, "seed": seed, "stream": True, "partial_images": partials}
    started, times = time.perf_counter(), []
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=TIMEOUT_S) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("event: "):
                times.append(time.perf_counter() - started)
            elif line.startswith('data: {"error"'):
                raise RuntimeError(line)
    if len(times) != partials + 1:
        raise RuntimeError(f"the stream has {len(times)} images instead of {partials + 1}")
    return times[0], times[-1]


def measure(url: str, size: str, concurrency: int, rounds: int, seeds: Iterator[int]) -> tuple[Rounds, Rounds]:
    """Return `rounds` rounds with partial images and as many without; they take turns in going first."""
    kinds = {PARTIALS: Rounds(), 0: Rounds()}
    with ThreadPoolExecutor(concurrency) as pool:
        for number in tqdm(range(rounds), desc=f"{size}, concurrency {concurrency}", disable=None):
            for partials in sorted(kinds, reverse=number % 2 == 0):
                round_seeds = [next(seeds) for _ in range(concurrency)]
                started = time.perf_counter()
                times = list(pool.map(lambda seed, p=partials: stream(url, size, seed, p), round_seeds))
                kinds[partials].total += time.perf_counter() - started
                kinds[partials].first += [first for first, _ in times]
                kinds[partials].final += [final for _, final in times]
    return kinds[PARTIALS], kinds[0]


def run(url: str, sizes: list[str], concurrency: list[int], rounds: int) -> None:
    """Measure and print the table."""
    seeds = itertools.count(secrets.randbelow(2**32))
    table = Table(title=f"{PARTIALS} partial images against none; medians in seconds, {rounds} rounds")
    for column in ("size", "concurrency", "first partial", "final", "without", "images/s", "without", "ratio"):
        table.add_column(column, justify="right")
    for size in sizes:
        stream(url, size, next(seeds), PARTIALS)  # warms up
        for requests in concurrency:
            partial, plain = measure(url, size, requests, rounds, seeds)
            seconds = [f"{median(times):.2f}" for times in (partial.first, partial.final, plain.final)]
            rates = [partial.images_per_second, plain.images_per_second]
            table.add_row(size, str(requests), *seconds, *(f"{r:.3f}" for r in rates), f"{rates[0] / rates[1]:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="sizes as WIDTHxHEIGHT")
    parser.add_argument("--concurrency", nargs="+", type=int, default=list(CONCURRENCY), help="requests in flight")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url = arguments.url
        if url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="glimmer-"))
            url = stack.enter_context(running_server(Path(folder)))
        run(url, arguments.sizes, arguments.concurrency, arguments.rounds)


if __name__ == "__main__":
    main()
