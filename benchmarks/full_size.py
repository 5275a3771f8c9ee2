"""The published size on a CUDA GPU, with random weights: correctness of a slice, then speed.

The floors are what the hardware allows: a planner step reads all weights once (bytes / memory bandwidth), a denoising
step does a known number of multiplications (FLOP / matrix throughput). Both rates are measured first, so ratios can be
compared between GPUs.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.full_size_planner import Floor, run_planner
from benchmarks.measure import drive
from engine.engine import Engine
from engine.jobs.job import JobSpec
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.paged_attention import PagedKV, PrefillAttention, PromptChunk, SequenceKV
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable
from models.glm_image.random_weights import random_glm_image
from models.glm_image.renderer import Renderer, RendererBatch, rotary_angles

SIDE, STEPS = 1024, 50
CONCURRENCY = (1, 4)
CHECKED_LAYERS = 2
TOLERANCE = 0.03  # of the largest value; bfloat16 keeps 8 bits, and errors of two layers add up


def run_full_size(device: torch.device) -> None:
    """Check a slice against float32, then measure both stages and whole requests.

    Raises:
        SystemExit: no CUDA device, or the slice deviates.
    """
    if device.type != "cuda":
        raise SystemExit("--size full needs a CUDA GPU; the weights alone take 33 GB")
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    check_slices(device, console)
    bandwidth, flops = measure_bandwidth(device), measure_flops(device)
    console.print(f"measured: {bandwidth / 1e12:.2f} TB/s memory, {flops / 1e12:.0f} TFLOP/s bfloat16 products")
    model = random_glm_image(device, torch.bfloat16)
    floor = Floor(planner_bytes(model.planner), model.planner.config.kv_bytes_per_token(2), bandwidth)
    run_planner(model, floor, console)
    planner_floor_ms = floor.pass_ms(1, 0)
    renderer_floor_s = renderer_flop(model.renderer.config) / flops
    engine = Engine(model)
    spec = JobSpec('a poster with top headline "SUMMER SALE"', SIDE, SIDE, seed=0, num_inference_steps=STEPS)
    drive(engine, [replace(spec, num_inference_steps=1)], 1)
    table = Table(title=f"{SIDE}x{SIDE}, {STEPS} steps; floors: {planner_floor_ms:.2f} ms a planner step, "
                        f"{renderer_floor_s:.2f} s of rendering an image")  # fmt: skip
    for heading in ("", "images/s", "p50 s", "planner ms/step", "to floor", "rendering s/image", "to floor"):
        table.add_column(heading, justify="left" if not heading else "right")
    for concurrency in CONCURRENCY:
        specs = [replace(spec, seed=seed) for seed in range(concurrency)]
        row = drive(engine, specs, concurrency)
        tokens = 2 * ((SIDE // 16) ** 2) * STEPS
        rendering = row.renderer_us_per_token * tokens / 1e6
        table.add_row(
            row.label,
            f"{row.images_per_second:.4f}",
            f"{row.p50:.2f}",
            f"{row.planner_ms_per_step:.2f}",
            f"{row.planner_ms_per_step / planner_floor_ms:.2f}",
            f"{rendering:.2f}",
            f"{rendering / renderer_floor_s:.2f}",
        )
    console.print(table)


def check_slices(device: torch.device, console: Console) -> None:
    """Compare two layers of both networks at full width in bfloat16 with float32, on the same weights."""
    planner_config = replace(PlannerConfig(), num_hidden_layers=CHECKED_LAYERS)
    renderer_config = replace(RendererConfig(), num_layers=CHECKED_LAYERS)
    model = random_glm_image(device, torch.bfloat16, planner=planner_config, renderer=renderer_config)
    for name, run, network in (
        ("planner", _run_planner, model.planner),
        ("renderer", _run_renderer, model.renderer),
    ):
        bfloat16 = run(network, device)  # type: ignore[operator]
        float32 = run(network.float(), device)  # type: ignore[operator]
        error = float((bfloat16.float() - float32).abs().max() / float32.abs().max())
        console.print(
            f"{name}: {CHECKED_LAYERS} layers at full width, bfloat16 against float32: {error:.4f} of the largest value"
        )
        if not error < TOLERANCE:
            raise SystemExit(f"{name}: more than {TOLERANCE} apart")


@torch.inference_mode()
def _run_planner(planner: Planner, device: torch.device) -> Tensor:
    dtype, length = planner.lm_head.weight.dtype, 200
    kv = PagedKV(planner.config, 16, 32, dtype, device)
    slot_mapping = torch.arange(length, device=device)
    chunk = PromptChunk(SequenceKV(kv, list(range(16))), 0, length)
    attention = PrefillAttention(kv, [chunk], slot_mapping)
    rotary = RotaryTable(planner.config, 1024, device).at(slot_mapping[:, None].expand(-1, 3), dtype)
    tokens = torch.randint(0, 16384, (length,), generator=torch.Generator().manual_seed(0)).to(device)
    return planner.logits(planner(tokens, PlannerBatch(rotary, attention)))


@torch.inference_mode()
def _run_renderer(renderer: Renderer, device: torch.device) -> Tensor:
    config, dtype = renderer.config, renderer.proj_out.weight.dtype
    rows = cols = 32
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(rows * cols, config.patch_dim, generator=draw).to(device, dtype)
    codes = torch.randint(0, 16384, (rows // 2, cols // 2), generator=draw).to(device)
    x = renderer.patches(latents) + renderer.plan(codes)
    angles = rotary_angles(rows, cols, config.attention_head_dim).to(device)
    batch = RendererBatch([len(x)], torch.zeros(len(x), dtype=torch.long, device=device), angles.cos(), angles.sin())
    return renderer(x, renderer.time_embeddings(torch.tensor([500.0], device=device), 512, 512), batch)


def planner_bytes(planner: Planner) -> int:
    """Return the bytes of the weights that a decode step reads: all but the embedding table."""
    table = planner.embed_tokens.weight.numel()
    return 2 * (sum(parameter.numel() for parameter in planner.parameters()) - table)


def renderer_flop(config: RendererConfig) -> float:
    """Return the FLOP of rendering one image with guidance: linear layers and attention."""
    tokens = (SIDE // 16) ** 2
    linear = 2 * 12 * config.dim**2  # q, k, v, out, and the two layers of the feed-forward
    attention = 4 * tokens * config.dim
    return 2 * STEPS * config.num_layers * tokens * (linear + attention)


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
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats
