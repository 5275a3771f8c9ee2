"""Attention of new tokens over a paged cache, with the same bits in any batch.

On CPUs a token attends to its length in whole blocks, under a mask, in products of at least `MIN_QUERIES` rows. So
several tokens of a sequence can be one product, which reads keys and values once.
"""

from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from models.glm_image.paged_attention import BlockTable, KeysAndValues, PagedKV

MAX_COUNT = 16  # new tokens of a sequence in one product
MIN_QUERIES = 4  # MKL has other kernels for fewer
CHECKED_LENGTHS = (*range(32, 513, 32), 768, 1024)  # SDPA goes through keys in parts of 512


@dataclass(frozen=True)
class _Span:
    """New tokens of one sequence and padded length."""

    rows: slice
    length: int
    table: BlockTable
    views: KeysAndValues | None
    mask: Tensor | None

    @property
    def is_single(self) -> bool:
        return self.rows.stop == self.rows.start + 1


class DecodeAttention:
    """Attention of `counts` consecutive new tokens of each sequence; tokens after them are padding.

    Args:
        lengths: tokens that each sequence's first new one can see.
        counts: 1 except on CPUs.
    """

    def __init__(
        self, kv: PagedKV, lengths: list[int], counts: list[int], tables: list[BlockTable], slot_mapping: Tensor
    ):
        self.kv, self.slot_mapping = kv, slot_mapping
        self._total, self._on_cpu = sum(counts), kv.pool.device.type == "cpu"
        if not self._on_cpu:
            self._spans = [self._span(table, i, i + 1, lengths[i], None) for i, table in enumerate(tables)]
            return
        visible = [length + i for length, count in zip(lengths, counts, strict=True) for i in range(count)]
        padded = [-(-length // kv.block_size) * kv.block_size for length in visible]
        mask = mask_beyond(visible, max(padded), kv.pool.dtype)
        self._spans = [
            self._span(tables[sequence], start, end, length, mask)
            for sequence, start, end, length in _spans(padded, counts, together=max(counts) > 1 and is_exact(kv))
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as `models.glm_image.planner.Attention`."""
        self.kv.write(layer, self.slot_mapping, k[: self._total], v[: self._total])
        queries = q.unflatten(1, (k.shape[1], -1))
        rows = single_rows(queries) if self._on_cpu else queries.unsqueeze(1).unbind(0)
        attended: list[Tensor] = []
        for span in self._spans:
            keys, values = self._keys_and_values(span, layer)
            if span.is_single:
                row = F.scaled_dot_product_attention(rows[span.rows.start], keys, values, attn_mask=span.mask)
                attended.append(row[:, :, : self.kv.group])
            else:
                attended.append(attend_together(queries[span.rows], keys, values, span.mask))
        padding = [queries.new_zeros(1, *queries.shape[1:]).expand(len(q) - self._total, -1, -1, -1)]
        return torch.cat(attended + padding).flatten(1, 2)

    def _span(self, table: BlockTable, start: int, end: int, length: int, mask: Tensor | None) -> _Span:
        if mask is not None:
            mask = query_mask(mask[start:end, :length], self.kv.group)
        views = self.kv.view(table, length) if isinstance(table, slice) else None
        return _Span(slice(start, end), length, table, views, mask)

    def _keys_and_values(self, span: _Span, layer: int) -> tuple[Tensor, Tensor]:
        if span.views is not None:
            return span.views[layer]
        assert isinstance(span.table, Tensor)
        return self.kv.gather(layer, span.table, span.length)


def mask_beyond(visible: list[int], length: int, dtype: torch.dtype) -> Tensor:
    """Return minus infinity where tokens are not visible [rows, length]."""
    hidden = torch.arange(length) >= torch.tensor(visible)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def query_mask(mask: Tensor, group: int) -> Tensor:
    """Repeat a mask [N, L] for the rows' queries."""
    return (mask if len(mask) == 1 else mask.repeat_interleave(group, 0))[None, None]


def single_rows(queries: Tensor) -> tuple[Tensor, ...]:
    """Return each row of [N, G, group, D] with at least `MIN_QUERIES` queries."""
    copies = -(-MIN_QUERIES // queries.shape[2])
    return (queries.repeat(1, 1, copies, 1) if copies > 1 else queries).unsqueeze(1).unbind(0)


def attend_together(queries: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from rows [N, G, group, D] to k and v [1, G, L, D] in one product."""
    packed = queries.transpose(0, 1).flatten(1, 2)[None]
    attended = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask)
    return attended[0].unflatten(1, (len(queries), -1)).transpose(0, 1)


def is_exact(kv: PagedKV) -> bool:
    """Return whether rows have the same bits alone and in one product."""
    groups, head_dim = kv.pool.shape[-2:]
    return _is_exact(groups, kv.group, head_dim, kv.pool.dtype, torch.get_num_threads())


@cache
@torch.inference_mode()
def _is_exact(groups: int, group: int, head_dim: int, dtype: torch.dtype, threads: int) -> bool:
    """Try all shapes: kernels depend on nothing else."""
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(MAX_COUNT, groups, group, head_dim, generator=draw).to(dtype)
    kv = torch.randn(2, 1, max(CHECKED_LENGTHS), groups, head_dim, generator=draw).to(dtype).transpose(2, 3)
    for length in CHECKED_LENGTHS:
        k, v = kv[:, :, :, :length]
        mask = mask_beyond(list(range(length - MAX_COUNT, length)), length, dtype)
        alone = torch.cat(
            [
                F.scaled_dot_product_attention(row, k, v, attn_mask=query_mask(mask[i : i + 1], group))[:, :, :group]
                for i, row in enumerate(single_rows(queries))
            ]
        )
        for count in range(2, MAX_COUNT + 1):
            together = attend_together(queries[:count], k, v, query_mask(mask[:count], group))
            if not torch.equal(together, alone[:count]):
                return False
    return True


def _spans(padded: list[int], counts: list[int], *, together: bool) -> list[tuple[int, int, int, int]]:
    """Return (sequence, start, end, padded length) of rows that are one product."""
    spans, start = list[tuple[int, int, int, int]](), 0
    for sequence, count in enumerate(counts):
        for length, run in groupby(padded[start : start + count]):
            end = start + len(list(run))
            step = MAX_COUNT if together else 1
            spans += [(sequence, first, min(first + step, end), length) for first in range(start, end, step)]
            start = end
    return spans
