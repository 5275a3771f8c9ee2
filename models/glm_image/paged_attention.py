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

BlockTable = slice | Tensor  # blocks side by side are read in place, others are gathered first
KeysAndValues = list[tuple[Tensor, Tensor]]  # by layer


class PagedKV:
    """The pool: keys and values of all layers, [layers, blocks, block_size, 2, G, D]."""

    def __init__(self, config: PlannerConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.block_size = block_size
        heads, head_dim = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, blocks, block_size, 2, heads, head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, G, D] at `places` [T] (block * block_size + offset)."""
        self.pool[layer].flatten(0, 1).index_copy_(0, places, torch.stack([k, v], dim=1))

    def table(self, blocks: list[int]) -> BlockTable:
        """How a sequence's blocks are found."""
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(blocks[0], blocks[0] + len(blocks))
        return torch.tensor(blocks, device=self.pool.device)

    def in_place(self, table: slice, length: int) -> KeysAndValues:
        """Keys and values of the first `length` tokens of a sequence whose blocks lie side by side, for every layer
        [1, G, L, D]: views, which show what is written later."""
        pages = self.pool[:, table].flatten(1, 2)[:, :length]
        k, v = pages.permute(2, 0, 3, 1, 4).unsqueeze(2).unbind(0)
        return list(zip(k.unbind(0), v.unbind(0), strict=True))

    def gather(self, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, G, L, D] of a layer, copied together from blocks that lie apart."""
        pages = self.pool[layer].index_select(0, table).flatten(0, 1)[:length]
        k, v = pages.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        return k, v

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all layers (a prompt's last, half-full block, which its images go on writing)."""
        self.pool[:, target].copy_(self.pool[:, source])


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


class DecodeAttention:
    """One new token a sequence. Rows past the last sequence are padding and attend to nothing.

    Args:
        lengths: tokens each sequence can see, the new one included.
        tables: where each sequence's blocks are.
        places: [sequences] where the new keys and values go.
    """

    def __init__(self, kv: PagedKV, lengths: list[int], tables: list[BlockTable], places: Tensor):
        self.kv, self.lengths, self.tables, self.places = kv, lengths, tables, places
        self._views = [
            kv.in_place(table, length) if isinstance(table, slice) else None
            for table, length in zip(tables, lengths, strict=True)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = len(self.lengths)
        self.kv.write(layer, self.places, k[:sequences], v[:sequences])
        # The heads of a group share their keys, so a group is what SDPA calls a head, its heads are the queries.
        queries = q.unflatten(1, (k.shape[1], -1)).unsqueeze(1).unbind(0)[:sequences]
        attended = [
            F.scaled_dot_product_attention(query, *self._keys_and_values(number, layer))
            for number, query in enumerate(queries)
        ]
        padding = [q.new_zeros(1, *attended[0].shape[1:]).expand(q.shape[0] - sequences, -1, -1, -1)]
        return torch.cat(attended + padding).flatten(1, 2)

    def _keys_and_values(self, number: int, layer: int) -> tuple[Tensor, Tensor]:
        views, table = self._views[number], self.tables[number]
        if views is not None:
            return views[layer]
        assert isinstance(table, Tensor)
        return self.kv.gather(layer, table, self.lengths[number])
