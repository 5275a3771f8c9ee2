"""The layout of a set of images in one tensor of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.renderer.rendering import Rendering
from models.batch_invariant import elementwise, padded
from models.device_copies import upload
from models.glm_image.render_operations import RendererBatch


@dataclass(frozen=True)
class Branch:
    """A sequence of the packed tensor: glyph tokens, then patches."""

    image: int
    start: int
    patches: slice
    glyphs: Tensor  # [g, dim]
    plan: Tensor  # [patches, dim], or [1, dim] for all
    source_kv: Tensor | None


@dataclass(frozen=True)
class PackedRenderings:
    """A set of images and their batch, reused while the same."""

    renderings: list[Rendering]
    batch: RendererBatch
    branches: list[Branch]
    base: Tensor  # [T, dim]: what a step's patches are added to
    # Of all images' patches, in order.
    conditional: Tensor  # [patches]: token of the conditional branch
    unconditional: Tensor | None  # [patches]: of the unconditional branch; None if no image has guidance
    guidance: Tensor  # [patches, 1] float32
    owner: Tensor  # [patches]: index of the image


def lay_out(renderings: list[Rendering], no_plan: Tensor, tile_height: int | None) -> PackedRenderings:
    """Pack images without padding between them."""
    branches = list(_branches(renderings, no_plan))
    size = padded(branches[-1].patches.stop, tile_height)
    device, (head_dim, dim) = no_plan.device, (renderings[0].angles.shape[1], no_plan.shape[1])
    base = no_plan.new_zeros(size, dim)
    modulation, angles = torch.ones(size, dtype=torch.long), torch.zeros(size, head_dim)
    for branch in branches:
        modulation[branch.start : branch.patches.start] = 2 * branch.image + 1
        modulation[branch.patches] = 2 * branch.image
        angles[branch.patches] = renderings[branch.image].angles
        base[branch.start : branch.patches.start], base[branch.patches] = branch.glyphs, branch.plan
    batch = RendererBatch(
        [branch.patches.stop - branch.start for branch in branches],
        upload(modulation, device),
        upload(elementwise(torch.cos, angles), device),
        upload(elementwise(torch.sin, angles), device),
        tile_height=tile_height,
        source_kv=[branch.source_kv for branch in branches],
    )
    counts = torch.tensor([rendering.patches for rendering in renderings])
    guidance = torch.tensor([r.request.spec.guidance_scale for r in renderings], dtype=torch.float32)
    is_guided = any(r.negative_glyphs is not None for r in renderings)
    return PackedRenderings(
        list(renderings),
        batch,
        branches,
        base,
        conditional=upload(_tokens(renderings, branches, 0), device),
        unconditional=upload(_tokens(renderings, branches, -1), device) if is_guided else None,
        guidance=upload(guidance.repeat_interleave(counts)[:, None], device),
        owner=upload(torch.arange(len(renderings)).repeat_interleave(counts), device),
    )


def _branches(renderings: list[Rendering], no_plan: Tensor) -> Iterator[Branch]:
    start = 0
    for image, rendering in enumerate(renderings):
        inputs = (rendering.plan, rendering.source_kv), (no_plan, None)
        for glyphs, (plan, source_kv) in zip(rendering.branches, inputs, strict=False):
            patches = slice(start + len(glyphs), start + len(glyphs) + rendering.patches)
            yield Branch(image, start, patches, glyphs, plan, source_kv)
            start = patches.stop


def _tokens(renderings: list[Rendering], branches: list[Branch], which: int) -> Tensor:
    """Return the tokens of the patches of every image's first or last branch."""
    of_images = [[b.patches for b in branches if b.image == image] for image in range(len(renderings))]
    return torch.cat([torch.arange(patches[which].start, patches[which].stop) for patches in of_images])
