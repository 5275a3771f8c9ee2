"""What a planner pass and a renderer tick launch, in the sizes of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.glm_image.kernels import layer, render_layer
from models.glm_image.kernels.nucleus import nucleus
from models.glm_image.kernels.paged_decode import PagedDecode

ROWS = 64
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a planner, its cache and a renderer; defaults are the published ones."""

    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    rotary_dim: int = 64
    hidden: int = 4096
    intermediate: int = 13696
    codes: int = 16384
    outputs: int = 16512  # codes, then control tokens
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 32
    max_length: int = 6400
    render_heads: int = 32
    render_head_dim: int = 128


PUBLISHED = Sizes()
NANO = Sizes(
    heads=4,
    head_dim=64,
    rotary_dim=32,
    hidden=192,
    intermediate=512,
    codes=6144,
    outputs=6160,
    render_heads=4,
    render_head_dim=64,
)
SMALL = Sizes(
    heads=4,
    head_dim=32,
    rotary_dim=16,
    hidden=128,
    intermediate=256,
    codes=512,
    outputs=528,
    render_heads=4,
    render_head_dim=16,
)


def launches(sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Return calls of every kernel's entry by name: for compilation, they would not run on these tensors."""

    def zeros(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    kv_width = 2 * sizes.kv_heads * sizes.head_dim
    pool = zeros(2, 4, sizes.block_size, 2, sizes.kv_heads, sizes.head_dim)
    queries = zeros(ROWS, sizes.heads, sizes.head_dim)
    indices = zeros(ROWS, dtype=torch.int32)
    tables = zeros(ROWS, sizes.max_length // sizes.block_size, dtype=torch.int32)
    rows, weight, angles = zeros(ROWS, sizes.hidden), zeros(sizes.hidden), zeros(ROWS, sizes.rotary_dim)
    numbers = zeros(ROWS, dtype=torch.float32)
    heads = zeros(ROWS, sizes.render_heads, sizes.render_head_dim)
    tokens, vectors, turns = heads.flatten(1), zeros(4, heads[0].numel()), heads[:, 0].float()
    attend = PagedDecode(pool, sizes.heads // sizes.kv_heads, sizes.max_length, ROWS)
    return {
        "paged_decode": lambda: attend(1, queries, tables, indices, indices + 1),
        "rotate_and_write": lambda: layer.rotate_and_write(
            zeros(ROWS, queries[0].numel() + kv_width), angles, angles, pool[1], indices.long()
        ),
        "rms_norm": lambda: layer.rms_norm(rows, weight, EPS),
        "add_rms_norm": lambda: layer.add_rms_norm(rows, rows, weight, weight, EPS),
        "swiglu": lambda: layer.swiglu(zeros(ROWS, 2 * sizes.intermediate)),
        "nucleus": lambda: nucleus(zeros(ROWS, sizes.outputs)[:, : sizes.codes], numbers, numbers, numbers, indices),
        "modulate": lambda: render_layer.modulate(tokens, vectors, vectors, indices),
        "add_modulate": lambda: render_layer.add_modulate(tokens, tokens, vectors, vectors, vectors, indices),
        "norm_rotate": lambda: render_layer.norm_rotate(
            tokens.repeat(1, 3), turns, turns, indices, heads, torch.stack([heads, heads])
        ),
    }
