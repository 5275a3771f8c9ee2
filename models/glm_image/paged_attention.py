"""Attention over a paged key/value cache.

The cache is one pool of blocks; a sequence owns a list of blocks, in order, so that its token t lives in block
`blocks[t // block_size]` at place `t % block_size`. Sequences of one prompt share the prompt's blocks.

    T   rows of this step, packed        L   tokens a sequence can see
    H, G   query heads, key/value heads  D   head dimension

Every sequence attends on its own, over exactly its own tokens: what it gets cannot depend on its neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.glm_image.config import PlannerConfig


class PagedKV:
    """The pool: keys and values of all layers, [layers][blocks * block_size, 2, G, D]."""

    def __init__(self, config: PlannerConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.block_size = block_size
        self.blocks = blocks
        shape = (blocks, block_size, 2, config.num_key_value_heads, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, G, D] at `places` [T] (block * block_size + offset)."""
        self.layers[layer].flatten(0, 1).index_copy_(0, places, torch.stack([k, v], dim=1))

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, L, D] of the first `length` tokens of a sequence."""
        pages = self.layers[layer].index_select(0, blocks).flatten(0, 1)[:length]
        k, v = pages.permute(1, 2, 0, 3).unbind(0)
        return k, v

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all layers (a prompt's last, half-full block, which its images go on writing)."""
        for pool in self.layers:
            pool[target].copy_(pool[source])


@dataclass(frozen=True)
class PrefillAttention:
    """Whole prompts, causal. Rows past the last prompt are padding and attend to nothing.

    Args:
        lengths: tokens of each prompt; they lie one after the other in the packed rows.
        places: [sum(lengths)] where their keys and values go.
    """

    kv: PagedKV
    lengths: list[int]
    places: Tensor

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = sum(self.lengths)
        self.kv.write(layer, self.places, k[:total], v[:total])
        out = torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        start = 0
        for length in self.lengths:
            rows = slice(start, start + length)
            keys, values = (x[rows].transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
            attended = F.scaled_dot_product_attention(q[rows].transpose(0, 1)[None], keys, values, is_causal=True)
            out[rows] = attended[0].transpose(0, 1)
            start += length
        return out


@dataclass(frozen=True)
class DecodeAttention:
    """One new token a sequence. Rows past the last sequence are padding and attend to nothing.

    Args:
        lengths: tokens each sequence can see, the new one included.
        blocks: each sequence's block numbers, as a tensor on the cache's device.
        places: [sequences] where the new keys and values go.
    """

    kv: PagedKV
    lengths: list[int]
    blocks: list[Tensor]
    places: Tensor

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = len(self.lengths)
        self.kv.write(layer, self.places, k[:rows], v[:rows])
        out = torch.zeros_like(q)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [T, G, H/G, D]: the heads of a group share their keys
        for row, (blocks, length) in enumerate(zip(self.blocks, self.lengths, strict=True)):
            keys, values = self.kv.read(layer, blocks, length)
            attended = F.scaled_dot_product_attention(grouped[row][None], keys[None], values[None])
            out[row] = attended[0].flatten(0, 1)
        return out
