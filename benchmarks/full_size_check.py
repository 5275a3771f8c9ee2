"""Correctness on a CUDA GPU at full width: bfloat16 against float32, kernels and attention against torch."""

from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from engine.renderer.cuda_network import CudaNetwork
from engine.renderer.runner import Network
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.paged_attention import PagedKV, PrefillAttention, PromptChunk, SequenceKV
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable
from models.glm_image.random_weights import random_glm_image
from models.glm_image.renderer import Renderer, RendererBatch, rotary_angles, stack_modulations

CHECKED_LAYERS = 2
TOLERANCE = 0.03  # of the largest value; bfloat16 keeps 8 bits, and errors of two layers add up
GLYPHS = (20, 1)  # tokens of the branches of a guided image


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
    temb = renderer.time_embeddings(torch.tensor([500.0], device=device), 512, 512)
    return renderer(x, stack_modulations(renderer.modulations(temb)), batch)


def check_fused(device: torch.device, console: Console) -> None:
    """Compare two layers with kernels to the same layers in float32: a guided image, and one with a source image."""
    config = replace(RendererConfig(), num_layers=CHECKED_LAYERS)
    model = random_glm_image(
        device, torch.bfloat16, planner=replace(PlannerConfig(), num_hidden_layers=1), renderer=config
    )
    network = CudaNetwork(model.renderer)
    compare_fused(model.renderer, network.forward, device, console)
    console.print(f"not used: {network.fallbacks}")


@torch.inference_mode()
def compare_fused(renderer: Renderer, network: Network, device: torch.device, console: Console) -> None:
    """Print how far apart they are.

    Raises:
        SystemExit: too far.
    """
    x, batch, modulations = ragged_batch(renderer, device)
    fused = network(x.clone(), modulations, batch).float()
    renderer.float()
    source_kv = [kv if kv is None else kv.float() for kv in batch.source_kv]
    plain = renderer(x.float(), modulations.float(), replace(batch, source_kv=source_kv))
    error = float((fused - plain).abs().max() / plain.abs().max())
    console.print(f"renderer: {CHECKED_LAYERS} layers with kernels against float32: {error:.4f} of the largest value")
    if not error < TOLERANCE:
        raise SystemExit(f"the renderer's kernels are more than {TOLERANCE} away")


def ragged_batch(renderer: Renderer, device: torch.device) -> tuple[Tensor, RendererBatch, Tensor]:
    """Return inputs of two guided images of different sizes, the second with a source image."""
    config, dtype = renderer.config, renderer.proj_out.weight.dtype
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    draw = torch.Generator().manual_seed(0)
    lengths, angles, index = [], [], []
    for image, (rows, cols) in enumerate(((32, 32), (24, 40))):
        for glyphs in GLYPHS:
            lengths.append(glyphs + rows * cols)
            angles += [torch.zeros(glyphs, head_dim), rotary_angles(rows, cols, head_dim)]
            index += glyphs * [2 * image + 1] + rows * cols * [2 * image]
    table = torch.cat(angles).to(device)
    source_kv = torch.randn(config.num_layers, 2, heads, 600, head_dim, generator=draw).to(device, dtype)
    batch = RendererBatch(
        lengths,
        torch.tensor(index, device=device),
        table.cos(),
        table.sin(),
        source_kv=[None, None, source_kv, None],
    )
    x = torch.randn(sum(lengths), config.dim, generator=draw).to(device, dtype)
    temb = renderer.time_embeddings(torch.tensor([500.0, 30.0], device=device), 512, 512)
    return x, batch, stack_modulations(renderer.modulations(temb))
