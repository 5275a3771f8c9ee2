"""Elementwise operations of a renderer layer, in float32, rounded once.

T   packed tokens      C   width      H, D   heads and their dimension      n   images
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.glm_image.kernels.launch import launch, next_power_of_2
from models.glm_image.render_operations import EPS

ROWS = 4  # tokens of a program, mostly with the same vectors
VALUES_PER_WARP = 512


@triton.jit
def _modulated(x, exists, scale, shift, SIZE: tl.constexpr, EPS: tl.constexpr):
    x = tl.where(exists, x - tl.sum(x, 0) / SIZE, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + EPS) * scale.to(tl.float32) + shift.to(tl.float32)


@triton.jit
def _vector(vectors, line, i, exists, SIZE: tl.constexpr):
    return tl.load(vectors + line * SIZE + i, mask=exists, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def modulate_kernel(
    x, shift, scale, index, out, rows,
    SIZE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise and modulate a few rows."""
    first, i = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    exists = i < SIZE
    line = tl.load(index + first)
    scales = _vector(scale, line, i, exists, SIZE)
    shifts = _vector(shift, line, i, exists, SIZE)
    for step in range(ROWS):
        row = first + step
        if row < rows:
            own = tl.load(index + row)
            if own != line:
                line = own
                scales = _vector(scale, line, i, exists, SIZE)
                shifts = _vector(shift, line, i, exists, SIZE)
            values = tl.load(x + row * SIZE + i, mask=exists, other=0.0).to(tl.float32)
            values = _modulated(values, exists, scales, shifts, SIZE, EPS)
            tl.store(out + row * SIZE + i, values.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def add_modulate_kernel(
    x, delta, gate, shift, scale, index, rows,
    SIZE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a gated branch to a few rows; normalise and modulate the sums."""
    first, i = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    exists = i < SIZE
    line = tl.load(index + first)
    gates = _vector(gate, line, i, exists, SIZE)
    scales = _vector(scale, line, i, exists, SIZE)
    shifts = _vector(shift, line, i, exists, SIZE)
    for step in range(ROWS):
        row = first + step
        if row < rows:
            own = tl.load(index + row)
            if own != line:
                line = own
                gates = _vector(gate, line, i, exists, SIZE)
                scales = _vector(scale, line, i, exists, SIZE)
                shifts = _vector(shift, line, i, exists, SIZE)
            at = row * SIZE + i
            added = tl.load(delta + at, mask=exists, other=0.0).to(tl.float32) * gates.to(tl.float32)
            total = (tl.load(x + at, mask=exists, other=0.0).to(tl.float32) + added).to(x.dtype.element_ty)
            tl.store(x + at, total, mask=exists)
            values = _modulated(total.to(tl.float32), exists, scales, shifts, SIZE, EPS)
            tl.store(delta + at, values.to(delta.dtype.element_ty), mask=exists)


@triton.jit
def norm_rotate_kernel(
    qkv, cos, sin, rows, q, k, v,
    H: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a token's queries, keys or values, in two halves of heads."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    exists = (head < H) & (i < HALF)
    inside = head * (2 * HALF) + i
    vectors = qkv + (3 * token + part) * (2 * H * HALF) + inside
    first = tl.load(vectors, mask=exists, other=0.0)
    second = tl.load(vectors + HALF, mask=exists, other=0.0)
    if part == 2:
        at = v + tl.load(rows + token).to(tl.int64) * (2 * H * HALF) + inside
        tl.store(at, first, mask=exists)
        tl.store(at + HALF, second, mask=exists)
    else:
        a, b = first.to(tl.float32), second.to(tl.float32)
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / (2 * HALF))[:, None]
        a, b = tl.where(exists, a - mean, 0.0), tl.where(exists, b - mean, 0.0)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + EPS)[:, None]
        a, b = a * scale, b * scale
        c = tl.load(cos + token * (2 * HALF) + i, mask=i < HALF, other=0.0)
        s = tl.load(sin + token * (2 * HALF) + i, mask=i < HALF, other=0.0)
        if part == 0:
            at = q + token * (2 * H * HALF) + inside
        else:
            at = k + tl.load(rows + token).to(tl.int64) * (2 * H * HALF) + inside
        tl.store(at, (a * c - b * s).to(first.dtype), mask=exists)
        tl.store(at + HALF, (b * c + a * s).to(first.dtype), mask=exists)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Return layer_norm(x) * scale + shift of rows [T, C], contiguous.

    Args:
        shift: vectors [2n, C], contiguous, as scale.
        index: each row's vector [T], int32.
    """
    out = torch.empty_like(x)
    launch(modulate_kernel, (_programs(x),), x, shift, scale, index, out, len(x), **_row_options(x.shape[1]))
    return out


def add_modulate(x: Tensor, delta: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Add delta * gate to x in place; return `modulate` of the sum, which overwrites delta."""
    arguments = x, delta, gate, shift, scale, index, len(x)
    launch(add_modulate_kernel, (_programs(x),), *arguments, **_row_options(x.shape[1]))
    return delta


def norm_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, q: Tensor, kv: Tensor) -> None:
    """Normalise and rotate queries and keys; write all for attention.

    Args:
        qkv: heads of queries, keys and values [T, 3 * H * D], contiguous.
        cos: [T, D] float32, as sin; the second half repeats the first.
        rows: of each token in `kv` [T], int32.
        q: [T, H, D], contiguous.
        kv: [2, rows, H, D], contiguous.
    """
    heads, head_dim = q.shape[1:]
    half = head_dim // 2
    block, heads_block = next_power_of_2(half), next_power_of_2(heads)
    launch(
        norm_rotate_kernel, (len(q), 3), qkv, cos, sin, rows, q, kv[0], kv[1],
        H=heads, HALF=half, EPS=EPS, HEADS=heads_block, BLOCK=block,
        num_warps=max(1, min(8, block * heads_block // VALUES_PER_WARP)),
    )  # fmt: skip


def _programs(x: Tensor) -> int:
    return -(-len(x) // ROWS)


def _row_options(size: int) -> dict[str, Any]:
    block = next_power_of_2(size)
    warps = max(1, min(8, block // VALUES_PER_WARP))
    return {"SIZE": size, "EPS": EPS, "ROWS": ROWS, "BLOCK": block, "num_warps": warps}
