"""The published size on a CUDA GPU, with random weights: correctness, then speed against what the hardware allows.

    python -m benchmarks.throughput --size full [--part check|planner|renderer|both] [--results FILE]

A part takes less than 10 minutes. Figures are kept in FILE: a run that was interrupted goes on where it stopped.
Floors: a planner pass reads all weights once, a denoising step does a known number of multiplications. Bandwidth and
throughput are measured first.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.full_size_check import check_fused, check_slices
from benchmarks.full_size_planner import Floor, check_replays, run_planner
from benchmarks.full_size_renderer import run_both, run_renderer
from benchmarks.measure import synchronize
from models.glm_image.model import GlmImage
from models.glm_image.planner import Planner
from models.glm_image.random_weights import random_glm_image

RESULTS = Path("out/full_size.json")
PARTS = ("check", "planner", "renderer", "both")


class Results:
    """Figures by name, in a file. Those of another device or torch are discarded."""

    def __init__(self, file: Path, device: str):
        self._file, self._device = file, device
        self._figures: dict[str, Any] = {}
        if file.is_file():
            saved = json.loads(file.read_text())
            self._figures = saved["figures"] if saved["device"] == device else {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a figure, measured unless it is there."""
        if name not in self._figures:
            self._figures[name] = work()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps({"device": self._device, "figures": self._figures}, indent=1))
        return self._figures[name]


def run_full_size(device: torch.device, parts: tuple[str, ...] = PARTS, file: Path = RESULTS) -> None:
    """Check slices against float32, then measure both stages, alone and together.

    Raises:
        SystemExit: no CUDA device, or a slice deviates.
    """
    if device.type != "cuda":
        raise SystemExit("--size full needs a CUDA GPU; the weights alone take 33 GB")
    console = Console(width=120)
    name = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    console.print(name)
    results = Results(file, name)
    if "check" in parts:
        check_slices(device, console)
        check_fused(device, console)
    bandwidth = results.measure("bytes per second", lambda: measure_bandwidth(device))
    flops = results.measure("FLOP per second", lambda: measure_flops(device))
    console.print(f"measured: {bandwidth / 1e12:.2f} TB/s memory, {flops / 1e12:.0f} TFLOP/s bfloat16 products")
    model = random_glm_image(device, torch.bfloat16)
    run_parts(model, parts, results, bandwidth, flops, console)


def run_parts(
    model: GlmImage, parts: tuple[str, ...], results: Results, bandwidth: float, flops: float, console: Console
) -> None:
    """Run the parts that need the whole model."""
    if "check" in parts or "planner" in parts:
        check_replays(model, console)
    if "planner" in parts:
        floor = Floor(planner_bytes(model.planner), model.planner.config.kv_bytes_per_token(2), bandwidth)
        run_planner(model, floor, results.measure, console)
    if "renderer" in parts:
        run_renderer(model, flops, results.measure, console)
    if "both" in parts:
        run_both(model, results.measure, console)


def planner_bytes(planner: Planner) -> int:
    """Return the bytes of the weights that a decode step reads: all but the embedding table."""
    table = planner.embed_tokens.weight.numel()
    return 2 * (sum(parameter.numel() for parameter in planner.parameters()) - table)


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a large copy, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def measure_flops(device: torch.device) -> float:
    """Return the FLOP per second of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    for _ in range(3):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats
