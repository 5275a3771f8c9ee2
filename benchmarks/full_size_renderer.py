"""Rendering, and both stages at once, in the published size on a CUDA GPU.

Part of `python -m benchmarks.throughput --size full`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.full_size_planner import Measure
from benchmarks.measure import Measurement, drive, synchronize
from engine.engine import Engine
from engine.geometry import Geometry
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.streams import CudaStreams, HostStreams, Streams
from models.glm_image.config import RendererConfig
from models.glm_image.model import GlmImage

STEPS = 50
PROMPT = 'a poster with top headline "SUMMER SALE"'
SIDE = 1024
CONCURRENCY = (1, 4, 16)
TARGETS = {(512, 8): 1.5, (1024, 1): 1.35, (2048, 1): 1.4}  # times the floor, by side and images at once


@dataclass(frozen=True)
class Case:
    """Images of a size at once."""

    side: int
    images: int

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side}, {self.images} at once"


CASES = (Case(512, 1), Case(512, 8), Case(1024, 1), Case(1024, 4), Case(2048, 1))


class OneStream(CudaStreams):
    """No overlap: all lanes are one stream, and the host waits for each tick before the next."""

    ticks_ahead = 0

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._streams = dict.fromkeys(self._streams, torch.cuda.Stream(device))


def renderer_flop(config: RendererConfig, side: int = SIDE, steps: int = STEPS) -> float:
    """Return the FLOP of rendering one image with guidance: linear layers and attention."""
    tokens = (side // 16) ** 2
    linear = 2 * 12 * config.dim**2  # q, k, v, out, and the two layers of the feed-forward
    attention = 4 * tokens * config.dim
    return 2 * steps * config.num_layers * tokens * (linear + attention)


def planned(side: int, seed: int, steps: int = STEPS, codes: int = 16384) -> JobSpec:
    """Return a request that comes with its plan: only rendering is left."""
    grid = Geometry(side, side).plan
    tokens = torch.randint(codes, (grid.tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    plan = {"rows": grid.rows, "cols": grid.cols, "tokens": tokens}
    return JobSpec(PROMPT, side, side, seed=seed, num_inference_steps=steps, plan=plan)


def run_renderer(
    model: GlmImage,
    flops: float,
    measure: Measure,
    console: Console,
    cases: Sequence[Case] = CASES,
    steps: int = STEPS,
) -> None:
    """Render given plans; compare the ticks with the floor, and with diffusers' network on the same weights."""
    engine = Engine(model, EngineLimits.choose(model, max_images=max(case.images for case in cases)))
    codes = model.renderer.config.prior_vq_quantizer_codebook_size
    console.print(f"not used: {engine.renderer.runner.fallbacks}")
    table = Table(title=f"{steps} steps with guidance, plans given")
    for heading in ("", "ticks, s/image", "floor", "ratio", "target", "with VAE, s/image", "VAE ms", "diffusers"):
        table.add_column(heading, justify="left" if not heading else "right")
    for case in cases:
        floor = renderer_flop(model.renderer.config, case.side, steps) / flops
        ticks, whole = measure(f"render {case.name}", lambda: list(_render(engine, case, steps, codes)))  # noqa: B023
        decode = measure(f"VAE {case.side}", lambda: decode_ms(model, case.side))  # noqa: B023
        theirs = measure(f"diffusers {case.side}", lambda: reference_step_seconds(model, case.side))  # noqa: B023
        row = (ticks, floor, ticks / floor, TARGETS.get((case.side, case.images)), whole, decode)
        other = f"{theirs * steps:.2f}" if theirs else "not installed"
        table.add_row(case.name, *("" if value is None else f"{value:.2f}" for value in row), other)
    console.print(table)


def run_both(
    model: GlmImage,
    measure: Measure,
    console: Console,
    side: int = SIDE,
    steps: int = STEPS,
    concurrency: Sequence[int] = CONCURRENCY,
) -> None:
    """Plan and render, with the stages at once and one after another."""
    table = Table(title=f"{side}x{side}, {steps} steps, both stages")
    for heading in ("", "at once", "images/s", "p50 s", "p95 s", "planner ms/step", "renderer µs/token"):
        table.add_column(heading, justify="left" if not heading else "right")
    on_cuda = model.device.type == "cuda"
    for count in concurrency:
        for overlaps in (True, False):
            streams = (CudaStreams if overlaps else OneStream)(model.device) if on_cuda else HostStreams()
            name = f"concurrency {count}, {'at once' if overlaps else 'in turns'}"
            row = measure(name, lambda: _both(model, streams, side, steps, count))  # noqa: B023
            table.add_row(str(count), "yes" if overlaps else "no", *(f"{value:.4g}" for value in row))
    console.print(table)


def _render(engine: Engine, case: Case, steps: int, codes: int) -> tuple[float, float]:
    """Return seconds of ticks, and of everything, per image."""
    drive(engine, [planned(case.side, seed, 2, codes) for seed in range(case.images)], case.images)
    specs = [planned(case.side, seed, steps, codes) for seed in range(case.images)]
    before = _tick_seconds(engine)
    run = drive(engine, specs, case.images)
    engine.step()  # hears of the last tick
    return (_tick_seconds(engine) - before) / case.images, run.seconds / case.images


def _both(model: GlmImage, streams: Streams, side: int, steps: int, count: int) -> list[float]:
    engine = Engine(model, EngineLimits.choose(model, max_images=max(count, 10)), streams=streams)
    spec = JobSpec(PROMPT, side, side, seed=0, num_inference_steps=steps)
    drive(engine, [replace(spec, num_inference_steps=1)], 1)
    run: Measurement = drive(engine, [replace(spec, seed=seed) for seed in range(count)], count)
    return [run.images_per_second, run.p50, run.p95, run.planner_ms_per_step, run.renderer_us_per_token]


def _tick_seconds(engine: Engine) -> float:
    return engine.metrics.registry.get_sample_value("glimmer_renderer_step_seconds_sum") or 0.0


@torch.inference_mode()
def decode_ms(model: GlmImage, side: int) -> float:
    """Return the milliseconds of decoding one image, without its copy to the host."""
    channels = model.renderer.config.in_channels
    latents = torch.randn(channels, side // 8, side // 8, generator=torch.Generator().manual_seed(0)).to(model.device)
    return 1e3 * min(_seconds(model, lambda: model.autoencoder.decode(latents)) for _ in range(3))


def reference_step_seconds(model: GlmImage, side: int) -> float | None:
    """Return the seconds of a guided step of diffusers' network on the same weights; None if it is not installed."""
    try:
        from diffusers import GlmImageTransformer2DModel
    except ImportError:
        return None
    config, device, dtype = model.renderer.config, model.device, model.dtype
    with torch.device("meta"):
        network: Any = GlmImageTransformer2DModel(
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            text_embed_dim=config.text_embed_dim,
            time_embed_dim=config.time_embed_dim,
            condition_dim=config.condition_dim,
            prior_vq_quantizer_codebook_size=config.prior_vq_quantizer_codebook_size,
        )
    network.load_state_dict(model.renderer.state_dict(), assign=True)
    patches = (side // 16) ** 2
    size = torch.tensor([[side, side]] * 2, device=device, dtype=dtype)
    with torch.inference_mode():
        inputs = {
            "hidden_states": torch.randn(2, config.in_channels, side // 8, side // 8, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 20, config.text_embed_dim, device=device, dtype=dtype),
            "prior_token_id": torch.zeros(2, patches, dtype=torch.long, device=device),
            "prior_token_drop": torch.zeros(2, patches, dtype=torch.bool, device=device),
            "timestep": torch.tensor([500.0, 500.0], device=device),
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }
        return min(_seconds(model, lambda: network(**inputs)) for _ in range(3))


def _seconds(model: GlmImage, work: Callable[[], object]) -> float:
    synchronize(model.device)
    started = time.perf_counter()
    work()
    synchronize(model.device)
    return time.perf_counter() - started
