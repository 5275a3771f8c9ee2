"""Denoising steps without planner and decoder: this engine and diffusers' transformer, on the same weights and threads.

    python -m benchmarks.rendering                     the small checkpoint and nano: microseconds per packed token
    python -m benchmarks.rendering --count             FLOP, bytes and operations of a step
    python -m benchmarks.rendering --before COMMIT     this engine at a commit, too

Both take turns. diffusers gets images of equal size in one batch, conditional and unconditional branches one after the
other, as its pipeline does. Steps of all images of a row are in flight at once, whatever the token budget.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImageTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.folders import cache_dir
from engine.engine import Engine
from engine.jobs.job import JobSpec, Plan
from engine.renderer.rendering import Rendering
from engine.renderer.runner import RendererRunner
from engine.request import Image, Request
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import cached_random_checkpoint
from models.nano import CHECKPOINT

SIDES, CONCURRENCY = (256, 512), (1, 4, 16)
PROMPT = 'a poster with top headline "SUMMER SALE" and a red circle'
STEPS = 200


class OperationCounter(TorchDispatchMode):
    """Counts operations that compute, their FLOP in products and attention, and bytes of their tensors.

    Counts one thread. Views are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes, self.flop = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(kwargs or {}).values(), out) if isinstance(t, Tensor)]
        tensors += [t for group in args if isinstance(group, (list, tuple)) for t in group if isinstance(t, Tensor)]
        if not func.is_view and "empty" not in func.name():
            self.operations += 1
            self.bytes += sum({t.data_ptr(): t.numel() * t.itemsize for t in tensors}.values())
        if func.name().startswith("mkldnn::_linear"):
            self.flop += 2 * args[0].numel() * len(args[1])
        elif "scaled_dot_product" in func.name():
            self.flop += 4 * args[0].numel() * args[1].shape[2]
        elif count := flop_registry.get(func.overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def renderings(runner: RendererRunner, side: int, count: int) -> list[Rendering]:
    spec = JobSpec(PROMPT, side, side, seed=0, num_inference_steps=STEPS)
    grid = spec.geometry.plan
    plan = Plan(grid.rows, grid.cols, [1] * grid.tokens)
    return [runner.prepare(Image(Request(str(i), spec), 0, plan=plan)) for i in range(count)]


def reference_step(transformer: Any, model: GlmImage, side: int, count: int) -> Callable[[], object]:
    """Return a step of diffusers' pipeline without its scheduler."""
    latents = torch.randn(count, model.renderer.config.in_channels, side // 8, side // 8)
    codes = torch.ones(count, (side // 16) ** 2, dtype=torch.long)
    glyphs = [model.glyphs.encode(texts)[None].expand(count, -1, -1) for texts in (["SUMMER SALE"], [])]

    @torch.inference_mode()
    def step() -> None:
        for branch, embeddings in enumerate(glyphs):
            transformer(
                hidden_states=latents,
                encoder_hidden_states=embeddings,
                prior_token_id=codes,
                prior_token_drop=torch.full_like(codes, branch, dtype=torch.bool),
                timestep=torch.full((count,), 499.0),
                target_size=torch.full((count, 2), float(side)),
                crop_coords=torch.zeros(count, 2),
                return_dict=False,
            )

    return step


def seconds_of_turns(steps: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median time of each, taking turns for `seconds`."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at or not times[0]:
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def measure(name: str, folder: Path, with_reference: bool, seconds: float, table: Table) -> None:
    model = GlmImage.load(str(folder), torch.device("cpu"), torch.float32)
    runner = Engine(model).renderer.runner
    transformer = GlmImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    for side in SIDES:
        for count in CONCURRENCY:
            images = renderings(runner, side, count)
            tokens = sum(image.tokens for image in images)

            def ours(images: list[Rendering] = images) -> None:
                for image in images:
                    image.step %= STEPS - 1
                runner.advance(images)

            steps: list[Callable[[], object]] = [ours]
            if with_reference:
                steps.append(reference_step(transformer, model, side, count))
            figures = [1e6 * taken / tokens for taken in seconds_of_turns(steps, seconds)]
            table.add_row(f"{name}, {count} of {side}x{side}", *(f"{figure:.1f}" for figure in figures))


def counted_step(model: GlmImage, side: int, count: int) -> tuple[OperationCounter, int]:
    """Return what a step of images does, on one thread, and its packed tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all in this thread
    try:
        runner = Engine(model).renderer.runner
        images = renderings(runner, side, count)
        runner.advance(images)  # lays out
        with OperationCounter() as counter:
            runner.advance(images)
    finally:
        torch.set_num_threads(threads)
    return counter, sum(image.tokens for image in images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count instead of measuring")
    parser.add_argument("--before", metavar="COMMIT", help="measure a commit, too; it needs this benchmark's imports")
    parser.add_argument("--only-engine", action="store_true", help="without diffusers")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a row (default %(default)s)")
    arguments = parser.parse_args()
    checkpoints = {"small": cached_random_checkpoint(cache_dir()), "nano": CHECKPOINT}
    console = Console(width=120)
    if arguments.count:
        table = Table("", "MFLOP per token", "kB per token", "operations", title="a denoising step")
        for name, folder in checkpoints.items():
            model = GlmImage.load(str(folder), torch.device("cpu"), torch.float32)
            for side, count in ((256, 1), (512, 1), (256, 4)):
                counter, tokens = counted_step(model, side, count)
                figures = f"{counter.flop / tokens / 1e6:.2f}", f"{counter.bytes / tokens / 1e3:.0f}"
                table.add_row(f"{name}, {count} of {side}x{side}", *figures, str(counter.operations))
        console.print(table)
        return
    headings = ["this engine"] if arguments.only_engine else ["this engine", "diffusers"]
    table = Table("", *headings, title=f"µs per packed token, {torch.get_num_threads()} threads, float32")
    for name, folder in checkpoints.items():
        measure(name, folder, not arguments.only_engine, arguments.seconds, table)
    console.print(table)
    if arguments.before:
        _measure_commit(arguments.before, arguments.seconds)


def _measure_commit(commit: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            (Path(folder) / "benchmarks" / "rendering.py").write_text(Path(__file__).read_text())
            command = [sys.executable, "-m", "benchmarks.rendering", "--only-engine", "--seconds", str(seconds)]
            subprocess.run(command, check=True, cwd=folder, env={"PYTHONPATH": folder})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True)


if __name__ == "__main__":
    main()
