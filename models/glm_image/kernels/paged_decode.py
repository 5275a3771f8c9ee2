"""Attention of decode rows over a paged cache.

    N   rows: new tokens, also several of a sequence      H, G, D   query heads, key/value heads, head dimension

A program attends to `SPLIT` tokens; a second kernel adds splits up in order. They do not depend on other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from models.glm_image.kernels.launch import launch, next_power_of_2

SPLIT = 256
TILE_BYTES = 16384  # of a product's keys: 64 tokens in the published sizes
MIN_QUERIES = 16  # rows of the smallest `tl.dot`
LOG2_E = 1.4426950408889634
HEAD_DIMS = (16, 32, 64, 128, 256)
SPLIT_STAGES = 5  # loads two tiles ahead, in 72 kB of shared memory: few programs have to hide the latency
DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["table_width"])
def split_kernel(
    q, pool, tables, row_sequence, lengths, partial, maximum, total, table_width,
    SCALE: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum values, weighted by 2^(score - maximum), and weights of a row and key/value head over one split."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    if split * SPLIT < length:
        query, dim = tl.arange(0, QUERIES), tl.arange(0, D)
        exists = query < GROUP
        line = (row * G + head) * GROUP + query
        queries = tl.load(q + line[:, None] * D + dim[None, :], mask=exists[:, None], other=0.0).to(DOT)
        table = tables + tl.load(row_sequence + row) * table_width
        highest = tl.full([QUERIES], -float("inf"), tl.float32)
        weight = tl.zeros([QUERIES], tl.float32)
        values = tl.zeros([QUERIES, D], tl.float32)
        for start in range(split * SPLIT, tl.minimum(length, (split + 1) * SPLIT), TILE):
            token = start + tl.arange(0, TILE)
            is_seen = token < length
            block = tl.load(table + token // PAGE, mask=is_seen, other=0).to(tl.int64)
            slot = pool + (block * PAGE + token % PAGE) * (2 * G * D) + head * D
            at = slot[:, None] + dim[None, :]
            k = tl.load(at, mask=is_seen[:, None], other=0.0).to(DOT)
            v = tl.load(at + G * D, mask=is_seen[:, None], other=0.0).to(DOT)
            score = tl.dot(queries, tl.trans(k), input_precision="ieee") * SCALE
            score = tl.where(is_seen[None, :], score, -float("inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            p = tl.exp2(score - higher[:, None])
            fade = tl.exp2(highest - higher)
            weight = weight * fade + tl.sum(p, 1)
            values = values * fade[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
            highest = higher
        line = ((row * G + head) * SPLITS + split) * GROUP + query
        tl.store(partial + line[:, None] * D + dim[None, :], values, mask=exists[:, None])
        tl.store(maximum + line, highest, mask=exists)
        tl.store(total + line, weight, mask=exists)


@triton.jit
def combine_kernel(
    partial, maximum, total, lengths, out,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """Add up the splits of a row's query head, in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    used = tl.cdiv(tl.load(lengths + row), SPLIT)
    dim, split = tl.arange(0, D), tl.arange(0, SPLITS_PADDED)
    first = (row * (H // GROUP) + head // GROUP) * SPLITS * GROUP + head % GROUP
    highest = tl.max(tl.load(maximum + first + split * GROUP, mask=split < used, other=-float("inf")), 0)
    weight = 0.0
    values = tl.zeros([D], tl.float32)
    for i in range(used):
        line = first + i * GROUP
        fade = tl.exp2(tl.load(maximum + line) - highest)
        weight += fade * tl.load(total + line)
        values += fade * tl.load(partial + line * D + dim)
    tl.store(out + (row * H + head) * D + dim, (values / weight).to(out.dtype.element_ty))


class PagedDecode:
    """Attention over `pool` [layers, blocks, block_size, 2, G, D]; `group` query heads share a key/value head.

    Raises:
        ValueError: a shape or dtype that the kernels lack.
    """

    def __init__(self, pool: Tensor, group: int, max_length: int, max_rows: int):
        _, _, self._page, _, self._groups, self._head_dim = pool.shape
        if self._head_dim not in HEAD_DIMS or pool.dtype not in DOT_TYPES or not pool.is_contiguous():
            raise ValueError(
                f"a contiguous cache of {', '.join(map(str, HEAD_DIMS))} dimensions a head, in float32, bfloat16 or "
                f"float16, is expected, not {pool.dtype} {tuple(pool.shape)}"
            )
        self.pool, self.group = pool, group
        self._splits = -(-max_length // SPLIT)
        shape = (max_rows, self._groups, self._splits, group)
        self._partial = torch.zeros(*shape, self._head_dim, dtype=torch.float32, device=pool.device)
        self._maximum, self._total = torch.zeros(2, *shape, dtype=torch.float32, device=pool.device)
        self._queries = max(MIN_QUERIES, next_power_of_2(group))
        self._warps = 4 if pool.itemsize == 2 else 8  # without tensor cores, in more registers
        self._tile = max(MIN_QUERIES, min(64, TILE_BYTES // (self._head_dim * pool.itemsize)))
        # The interpreter's `tl.dot` is wrong for bfloat16.
        self._dot = tl.float32 if knobs.runtime.interpret else DOT_TYPES[pool.dtype]

    def __call__(self, layer: int, q: Tensor, tables: Tensor, row_sequence: Tensor, lengths: Tensor) -> Tensor:
        """Attend from q [N, H, D], contiguous, to tokens that are in the cache.

        Args:
            tables: sequences' blocks [sequences, blocks], int32.
            row_sequence: rows' lines of `tables` [N], int32.
            lengths: visible tokens, from 1 to `max_length` [N], int32.
        """
        rows, heads, _ = q.shape
        if rows > len(self._partial):
            raise ValueError(f"{rows} rows are more than the {len(self._partial)} of the buffers")
        out = torch.empty_like(q)
        partials = self._partial, self._maximum, self._total
        sizes = {"GROUP": self.group, "D": self._head_dim, "SPLIT": SPLIT, "SPLITS": self._splits}
        launch(
            split_kernel, (rows, self._groups, self._splits),
            q, self.pool[layer], tables, row_sequence, lengths, *partials, tables.stride(0),
            SCALE=LOG2_E * self._head_dim**-0.5, G=self._groups, QUERIES=self._queries, PAGE=self._page,
            TILE=self._tile, DOT=self._dot, num_warps=self._warps, num_stages=SPLIT_STAGES, **sizes,
        )  # fmt: skip
        launch(
            combine_kernel, (rows, heads), *partials, lengths, out,
            H=heads, SPLITS_PADDED=next_power_of_2(self._splits), num_warps=1, **sizes,
        )  # fmt: skip
        return out
