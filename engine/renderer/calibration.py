"""How many tokens a tick should have: as few as make a token nearly as cheap as it gets on this device.

Fewer waste the device; more make the images of a tick late without making any cheaper. Measured when an engine starts,
and kept in a file per device, model and dtype.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.device_memory import lock_for_a_time
from engine.jobs.job import JobSpec, Plan
from engine.observability.logs import event
from engine.renderer.rendering import Rendering
from engine.renderer.runner import RendererRunner
from engine.request import Image, Request
from engine.streams import Streams

VERSION = 1  # of what is measured, and of the files
SIDE = 256
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # images of a tick
SLACK = 1.1
REPEATS, LIMIT_S = 3, 6.0
STEPS = REPEATS + 2

logger = logging.getLogger("glimmer.engine")

Point = tuple[int, float]
"""Tokens of a tick, and its seconds."""


def knee(points: Sequence[Point]) -> int:
    """Return the fewest tokens whose seconds per token are within `SLACK` of the least."""
    least = min(seconds / tokens for tokens, seconds in points)
    return min(tokens for tokens, seconds in points if seconds / tokens <= SLACK * least)


def measure(runner: RendererRunner, streams: Streams, max_tokens: int) -> list[Point]:
    """Time ticks of more and more images, for `LIMIT_S` and up to `max_tokens`."""
    points: list[Point] = []
    give_up_at = time.monotonic() + LIMIT_S
    for count in COUNTS:
        renderings = [_rendering(runner, number) for number in range(count)]
        tokens = sum(rendering.tokens for rendering in renderings)
        if points and (tokens > max_tokens or time.monotonic() > give_up_at):
            break
        seconds = [_tick(runner, streams, renderings)]  # it prepares
        while len(seconds) <= REPEATS and time.monotonic() < give_up_at:
            seconds.append(_tick(runner, streams, renderings))
        points.append((tokens, min(seconds[1:] or seconds)))
        for rendering in renderings:
            runner.release(rendering.request)
    return points


def calibrated_budget(runner: RendererRunner, streams: Streams, max_tokens: int, folder: Path | None) -> int:
    """Return the tokens of a tick, from a file in `folder` if this was measured before."""
    described = _describe(runner)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    file = folder and folder / f"render-budget-{digest}.json"
    with _locked(folder):
        if (kept := _read(file, described)) is not None:
            return min(kept, max_tokens)
        began = time.monotonic()
        points = measure(runner, streams, max_tokens)
        budget = min(knee(points), max_tokens)
        _write(file, described | {"budget": budget, "points": points})
    tokens, seconds = min(points, key=lambda point: abs(point[0] - budget))
    event(
        logger,
        "render_token_budget_measured",
        budget=budget,
        us_per_token=1e6 * seconds / tokens,
        seconds=time.monotonic() - began,
    )
    return budget


def cache_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/glimmer`, by default `~/.cache/glimmer`; None without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glimmer"
    return None


def _rendering(runner: RendererRunner, number: int) -> Rendering:
    spec = JobSpec("", SIDE, SIDE, seed=number, num_inference_steps=STEPS)
    grid = spec.geometry.plan
    return runner.prepare(
        Image(Request(f"calibration-{number}", spec), 0, plan=Plan(grid.rows, grid.cols, [0] * grid.tokens))
    )


def _tick(runner: RendererRunner, streams: Streams, renderings: list[Rendering]) -> float:
    begun = streams.mark("renderer")
    runner.advance(renderings)
    ended = streams.mark("renderer")
    ended.wait()
    return ended.seconds_since(begun)


def _describe(runner: RendererRunner) -> dict[str, Any]:
    """Return what a budget is for."""
    device = runner.model.device
    return {
        "version": VERSION,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "dtype": str(runner.model.dtype),
        "fallbacks": sorted(runner.fallbacks),
        "renderer": asdict(runner.renderer.config),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """Let one engine of a machine measure at a time, where there is a folder to write to."""
    lock = -1
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "render-budget.lock"
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            lock_for_a_time(lock, path)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _read(file: Path | None, described: dict[str, Any]) -> int | None:
    """Return the budget in a file, None if there is none for exactly this."""
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text())
        is_this = {name: kept[name] for name in described} == json.loads(json.dumps(described))
        budget = kept["budget"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return budget if is_this and type(budget) is int and budget > 0 else None


def _write(file: Path | None, content: dict[str, Any]) -> None:
    if file is None:
        return
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(file)
    except OSError as error:
        event(logger, "render_token_budget_not_kept", logging.WARNING, reason=str(error))
