"""A paged key/value cache, and attention over prompts, separately for each sequence: it cannot depend on the batch.

Token t of a sequence is in slot `blocks[t // block_size] * block_size + t % block_size`. Sequences of one prompt share
its full blocks.

    T   packed tokens of a step          L   tokens a sequence can see
    H, G   query heads, key/value heads  D   head dimension
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from models.glm_image.config import PlannerConfig

KeysAndValues = list[tuple[Tensor, Tensor]]  # by layer


class PagedKV:
    """Keys and values [layers, blocks, block_size, 2, G, D]."""

    def __init__(self, config: PlannerConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        self.block_size = block_size
        heads, head_dim = config.num_key_value_heads, config.head_dim
        self.group = config.num_attention_heads // heads  # query heads that share keys
        shape = (config.num_hidden_layers, blocks, block_size, 2, heads, head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)

    def slots(self, blocks: list[int], tokens: Iterable[int]) -> list[int]:
        """Return where tokens of a sequence lie."""
        return [blocks[token // self.block_size] * self.block_size + token % self.block_size for token in tokens]

    def write(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, G, D]."""
        self.pool[layer].flatten(0, 1).index_copy_(0, slot_mapping, torch.stack([k, v], dim=1))

    def clear(self, slots: Tensor) -> None:
        """Zero slots: what a mask hides must be finite."""
        self.pool.flatten(1, 2).index_fill_(1, slots, 0)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block in all layers."""
        self.pool[:, target].copy_(self.pool[:, source])


class SequenceKV:
    """Keys and values of the sequence with these blocks; contiguous ones are read in place."""

    def __init__(self, kv: PagedKV, blocks: list[int]):
        self._kv = kv
        first, end = blocks[0], blocks[0] + len(blocks)
        is_contiguous = blocks == list(range(first, end))
        self._table = slice(first, end) if is_contiguous else torch.tensor(blocks, device=kv.pool.device)
        self._views: dict[int, KeysAndValues] = {}  # of the last lengths

    def view(self, length: int) -> KeysAndValues | None:
        """Return views [1, G, L, D] of all layers, later writes included; None: not contiguous."""
        if not isinstance(self._table, slice):
            return None
        if length not in self._views:
            pages = self._kv.pool[:, self._table].flatten(1, 2)[:, :length]
            k, v = pages.permute(2, 0, 3, 1, 4).unsqueeze(2).unbind(0)
            recent = {n: views for n, views in self._views.items() if n >= length - self._kv.block_size}
            self._views = recent | {length: list(zip(k.unbind(0), v.unbind(0), strict=True))}
        return self._views[length]

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views or copies [1, G, L, D] for a layer."""
        views = self.view(length)
        return views[layer] if views else self.gather(layer, length)

    def gather(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Return copies [1, G, L, D] for a layer."""
        assert isinstance(self._table, Tensor)
        pages = self._kv.pool[layer].index_select(0, self._table).flatten(0, 1)[:length]
        k, v = pages.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        return k, v


@dataclass(frozen=True)
class PromptChunk:
    """Prompt tokens `start` to `end`, after others that are cached."""

    sequence: SequenceKV
    start: int
    end: int


@dataclass(frozen=True)
class PrefillAttention:
    """Causal attention over chunks of prompts; tokens after them are padding."""

    kv: PagedKV
    chunks: list[PromptChunk]
    slot_mapping: Tensor  # of all their tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = len(self.slot_mapping)
        self.kv.write(layer, self.slot_mapping, k[:total], v[:total])
        out = torch.zeros_like(q)
        start = 0
        for chunk in self.chunks:
            rows = slice(start, start + chunk.end - chunk.start)
            queries = q[rows].transpose(0, 1)[None]
            if chunk.start:
                attended = self._attend_cached(layer, chunk, queries)
            else:
                keys, values = (x[rows].transpose(0, 1).repeat_interleave(self.kv.group, 0)[None] for x in (k, v))
                attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            out[rows] = attended[0].transpose(0, 1)
            start = rows.stop
        return out

    def _attend_cached(self, layer: int, chunk: PromptChunk, queries: Tensor) -> Tensor:
        keys, values = chunk.sequence.read(layer, chunk.end)
        mask = causal_lower_right(queries.shape[2], chunk.end)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
