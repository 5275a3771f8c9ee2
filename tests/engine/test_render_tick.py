"""What the host does for a tick on a GPU, on tensors without values: whatever reads one raises."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.jobs.job import JobSpec, TokenGrid
from engine.renderer.rendering import Rendering
from engine.renderer.runner import RendererRunner
from engine.request import Request
from engine.streams import HostStreams
from models.glm_image.config import RendererConfig
from models.glm_image.cuda_attention import SequenceAttention
from models.glm_image.fused_renderer import FusedRenderer
from models.glm_image.kernels.render_check import RenderKernels
from models.glm_image.model import GlmImage, build_on_meta
from models.glm_image.renderer import Renderer, RendererBatch

GPU = torch.device("meta")


class Operations(TorchDispatchMode):
    """Counts operations, and copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.numel() > 1]
        if len({x.device.type for x in tensors}) > 1:
            self.copies.append(str(func))
        self.names[str(func)] += 1
        return out


def launches() -> RenderKernels:
    """Return stand-ins for kernels: a launch is an operation without arithmetic."""
    return RenderKernels(
        modulate=lambda x, *_: torch.empty_like(x),
        add_modulate=lambda x, delta, *_: delta,
        norm_rotate=lambda *_: None,
        linear_gelu=lambda x, weight, bias: x.new_empty(len(x), len(weight)),
    )


def published(layers: int) -> tuple[Renderer, FusedRenderer]:
    """Build layers of the published renderer on a GPU without values."""
    model = build_on_meta(lambda: Renderer(RendererConfig(num_layers=layers)).to(torch.bfloat16))
    return model, FusedRenderer(model, launches(), SequenceAttention())


def batch_of(model: Renderer, lengths: list[int], sources: int = 0) -> tuple[Tensor, Tensor, RendererBatch]:
    """Return inputs of images with guidance; the first may have source images."""
    config, tokens = model.config, sum(lengths)
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    with GPU:
        kv = torch.empty(config.num_layers, 2, heads, sources, head_dim, dtype=torch.bfloat16) if sources else None
        angles = torch.empty(tokens, head_dim)
        index = torch.zeros(tokens, dtype=torch.long)
        x = torch.empty(tokens, config.dim, dtype=torch.bfloat16)
        modulations = torch.empty(6 * config.num_layers + 2, len(lengths), config.dim, dtype=torch.bfloat16)
    return x, modulations, RendererBatch(lengths, index, angles, angles, source_kv=[kv] + [None] * (len(lengths) - 1))


@torch.inference_mode()
def operations(layers: int, lengths: list[int], sources: int = 0) -> Operations:
    """Count those of the second step of a batch."""
    model, fused = published(layers)
    inputs = batch_of(model, lengths, sources)
    assert fused(*inputs).device == GPU
    with Operations() as counted:
        fused(*inputs)
    return counted


def per_layer(lengths: list[int], sources: int = 0) -> int:
    few, many = (operations(layers, lengths, sources).names.total() for layers in (2, 4))
    return (many - few) // 2


def test_a_layer_dispatches_the_same_whatever_the_size_and_little_more_for_a_sequence() -> None:
    small, large = per_layer([1025, 1030]), per_layer([16385, 16400])
    assert small == large <= 45
    sequence = per_layer([1025, 1030] * 2) - small
    assert sequence == per_layer([1025, 1030] * 3) - per_layer([1025, 1030] * 2) <= 2 * 7
    assert per_layer([1025, 1030], sources=500) - small <= 6


def test_a_step_moves_nothing_between_host_and_device() -> None:
    counted = operations(2, [1025, 1030] * 2, sources=500)
    assert not counted.copies
    assert not {name for name in counted.names if "local_scalar" in name or "nonzero" in name}


def renderings(model: Renderer, sides: list[int], steps: int = 20) -> list[Rendering]:
    """Return images of these sizes in pixels, every other one without guidance."""
    config, images = model.config, []
    for number, side in enumerate(sides):
        spec = JobSpec("x", side, side, seed=0, num_inference_steps=steps, guidance_scale=1.5)
        geometry, image = spec.geometry, Request(str(number), spec).images[0]
        patches, glyphs = geometry.patches.tokens, 20 + number
        with GPU:
            tensors: dict[str, Any] = {
                "latents": torch.empty(patches, config.patch_dim),
                "plan": torch.empty(patches, config.dim, dtype=torch.bfloat16),
                "glyphs": torch.empty(glyphs, config.dim, dtype=torch.bfloat16),
                "time_embeddings": torch.empty(steps, config.time_embed_dim, dtype=torch.bfloat16),
                "distances": torch.empty(steps),
            }
            negative = torch.empty(1, config.dim, dtype=torch.bfloat16) if number % 2 == 0 else None
        grid, angles = TokenGrid(1, 1, [0]), torch.zeros(patches, config.attention_head_dim)
        rendering = Rendering(
            image,
            geometry,
            grid,
            is_preview=False,
            partial_after=[],
            negative_glyphs=negative,
            sigmas=torch.zeros(steps + 1),
            angles=angles,
            source_kv=None,
            **tensors,
        )
        images.append(rendering)
    return images


def tick(layers: int, sides: list[int]) -> Operations:
    """Count the operations of the whole second tick of a set of images."""
    model, fused = published(layers)
    parts = SimpleNamespace(renderer=model, device=GPU, dtype=torch.bfloat16)
    runner = RendererRunner(cast(GlmImage, parts), HostStreams())
    runner._network = fused
    images = renderings(model, sides)
    runner.advance(images)
    with Operations() as counted:
        runner.advance(images)
    assert {rendering.step for rendering in images} == {2}
    assert {rendering.latents.device for rendering in images} == {GPU}
    return counted


def test_the_whole_tick_reads_nothing_and_depends_on_no_size() -> None:
    one, larger = tick(2, [512]), tick(2, [2048])
    assert one.names.total() == larger.names.total() <= 2 * 27 + 60
    assert not one.copies
    assert not larger.copies
    mixed, several = tick(2, [512, 1024]), tick(2, [512, 1024, 2048])
    assert not several.copies
    assert several.names.total() - mixed.names.total() <= 40
    assert (tick(4, [512]).names.total() - one.names.total()) // 2 == per_layer([1025, 1030])


def test_reads_and_copies_are_noticed() -> None:
    tensor = torch.empty(3, device=GPU)
    with Operations() as counted:
        tensor.copy_(torch.ones(3))
    assert counted.copies
    with pytest.raises(RuntimeError, match="meta"):
        bool(tensor.any())
