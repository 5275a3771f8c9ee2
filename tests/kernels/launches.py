"""What the planner's decode step launches, in the sizes of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.glm_image.kernels.paged_decode import PagedDecode

ROWS = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of a planner and its cache; defaults are the published ones."""

    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 32
    max_length: int = 6400


PUBLISHED = Sizes()
NANO = Sizes(heads=4, head_dim=64)
SMALL = Sizes(heads=4, head_dim=32)


def launches(sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Return calls of every entry, by its kernels' name; compiled, not run."""
    return {"paged_decode": lambda: _paged_decode(sizes)}


def _paged_decode(sizes: Sizes) -> object:
    group = sizes.heads // sizes.kv_heads
    pool = torch.zeros(2, 4, sizes.block_size, 2, sizes.kv_heads, sizes.head_dim, dtype=sizes.dtype)
    attend = PagedDecode(pool, group, sizes.max_length, ROWS)
    q = torch.zeros(ROWS, sizes.heads, sizes.head_dim, dtype=sizes.dtype)
    rows = torch.ones(ROWS, dtype=torch.int32)
    return attend(1, q, torch.zeros(ROWS, sizes.max_length // sizes.block_size, dtype=torch.int32), rows, rows)
