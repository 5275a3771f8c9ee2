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

from models.glm_image.paged_attention import KeysAndValues, PagedKV, SequenceKV

MAX_COUNT = 16  # new tokens of a sequence in one product
MIN_QUERIES = 4  # MKL has other kernels for fewer
CHECKED_LENGTHS = (*range(32, 513, 32), 768, 1024)  # SDPA goes through keys in parts of 512


@dataclass(frozen=True)
class _Span:
    """New tokens of one sequence and padded length."""

    rows: slice
    length: int
    sequence: SequenceKV
    views: KeysAndValues | None
    mask: Tensor | None

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.sequence.gather(layer, self.length)


class DecodeAttention:
    """Attention of `counts` consecutive new tokens of each sequence; tokens after them are padding.

    Args:
        lengths: tokens that each sequence's first new one can see.
        counts: 1 except on CPUs.
    """

    def __init__(
        self, kv: PagedKV, sequences: list[SequenceKV], lengths: list[int], counts: list[int], slot_mapping: Tensor
    ):
        self.kv, self.slot_mapping = kv, slot_mapping
        self._total, self._on_cpu = sum(counts), kv.pool.device.type == "cpu"
        visible = [length + i for length, count in zip(lengths, counts, strict=True) for i in range(count)]
        block_size = kv.block_size if self._on_cpu else 1
        padded = [-(-length // block_size) * block_size for length in visible]
        mask = mask_beyond(visible, max(padded), kv.pool.dtype) if self._on_cpu else None
        self._spans = [
            self._span(sequences[index], slice(start, end), length, mask)
            for index, start, end, length in _spans(padded, counts, together=max(counts) > 1 and is_exact(kv))
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as `models.glm_image.planner.Attention`."""
        self.kv.write(layer, self.slot_mapping, k[: self._total], v[: self._total])
        queries = q.unflatten(1, (k.shape[1], -1))
        if len(self._spans) == self._total:
            rows = self._rows(queries)
            attended = [
                F.scaled_dot_product_attention(
                    row, *(span.views[layer] if span.views else span.gather(layer)), attn_mask=span.mask
                )
                for row, span in zip(rows, self._spans, strict=False)
            ]
        else:
            attended = [self._attend_any(span, layer, queries[span.rows]) for span in self._spans]
        padding = [attended[0].new_zeros(1, *attended[0].shape[1:]).expand(len(q) - self._total, -1, -1, -1)]
        return torch.cat(attended + padding)[:, :, : self.kv.group].flatten(1, 2)

    def _span(self, sequence: SequenceKV, rows: slice, length: int, mask: Tensor | None) -> _Span:
        if mask is not None:
            mask = query_mask(mask[rows, :length], self.kv.group)
        return _Span(rows, length, sequence, sequence.view(length), mask)

    def _rows(self, queries: Tensor) -> tuple[Tensor, ...]:
        return single_rows(queries) if self._on_cpu else queries.unsqueeze(1).unbind(0)

    def _attend_any(self, span: _Span, layer: int, queries: Tensor) -> Tensor:
        keys, values = span.views[layer] if span.views else span.gather(layer)
        if len(queries) > 1:
            return attend_together(queries, keys, values, span.mask)
        [row] = self._rows(queries)
        attended = F.scaled_dot_product_attention(row, keys, values, attn_mask=span.mask)
        return attended[:, :, : self.kv.group]


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
