"""Elementwise operations of a planner layer, rounded where torch's would round; sums are float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.glm_image.kernels.launch import launch, next_power_of_2

VALUES_PER_WARP = 512
SWIGLU_BLOCK = 1024


@triton.jit
def rotate_and_write_kernel(
    qkv, cos, sin, cache, slots, out,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate and store a head."""
    row, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    exists = dim < D
    vector = qkv + (row * (H + 2 * G) + head) * D
    x = tl.load(vector + dim, mask=exists, other=0.0)
    if head < H + G:
        is_first, is_rotated = dim < R // 2, dim < R
        other = tl.load(vector + tl.where(is_first, dim + R // 2, dim - R // 2), mask=is_rotated, other=0.0)
        c = tl.load(cos + row * R + dim, mask=is_rotated, other=0.0)
        s = tl.load(sin + row * R + dim, mask=is_rotated, other=0.0)
        kept = (x.to(tl.float32) * c.to(tl.float32)).to(c.dtype).to(tl.float32)
        added = (other.to(tl.float32) * s.to(tl.float32)).to(c.dtype).to(tl.float32)
        x = tl.where(is_rotated, tl.where(is_first, kept - added, kept + added).to(x.dtype), x)
    if head < H:
        tl.store(out + (row * H + head) * D + dim, x, mask=exists)
    else:
        at = cache + tl.load(slots + row) * (2 * G * D) + (head - H) * D
        tl.store(at + dim, x, mask=exists)


@triton.jit
def _normalise(x, weight, SIZE: tl.constexpr, EPS: tl.constexpr):
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + EPS)
    return x * scale * weight


@triton.jit
def rms_norm_kernel(x, weight, out, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise a row."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    exists = i < SIZE
    values = tl.load(x + row * SIZE + i, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(weight + i, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, _normalise(values, scale, SIZE, EPS).to(out.dtype.element_ty), mask=exists)


@triton.jit
def add_rms_norm_kernel(
    x, delta, delta_weight, weight, total, out, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add a normalised row to another; normalise the sum."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    exists = i < SIZE
    at = row * SIZE + i
    added = tl.load(delta + at, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(delta_weight + i, mask=exists, other=0.0).to(tl.float32)
    added = _normalise(added, scale, SIZE, EPS).to(total.dtype.element_ty).to(tl.float32)
    values = (tl.load(x + at, mask=exists, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + at, values, mask=exists)
    scale = tl.load(weight + i, mask=exists, other=0.0).to(tl.float32)
    normed = _normalise(values.to(tl.float32), scale, SIZE, EPS)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=exists)


@triton.jit
def swiglu_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply a part of a row."""
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = i < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + i, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=exists, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + i, (activated * up).to(out.dtype.element_ty), mask=exists)


def rotate_and_write(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Rotate as `planner.rotate`, to the bit; store keys and values; return queries [N, H, D].

    Args:
        qkv: heads of queries, keys and values [N, (H + 2G) * D], contiguous.
        cos: [N, R], as sin.
        cache: of a layer [blocks, block_size, 2, G, D].
        slots: [N], int64.
    """
    groups, head_dim = cache.shape[-2:]
    heads = qkv.shape[1] // head_dim
    out = qkv.new_empty(len(qkv), heads - 2 * groups, head_dim)
    launch(
        rotate_and_write_kernel, (len(qkv), heads), qkv, cos, sin, cache, slots, out,
        H=heads - 2 * groups, G=groups, D=head_dim, R=cos.shape[1], BLOCK=next_power_of_2(head_dim),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows [N, C], contiguous."""
    out = torch.empty_like(x)
    launch(rms_norm_kernel, (len(x),), x, weight, out, EPS=eps, **_row_options(x.shape[1]))
    return out


def add_rms_norm(x: Tensor, delta: Tensor, delta_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + rms_norm(delta), and that sum normalised; all [N, C], contiguous."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    options = _row_options(x.shape[1])
    launch(add_rms_norm_kernel, (len(x),), x, delta, delta_weight, weight, total, out, EPS=eps, **options)
    return total, out


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of rows [N, 2I], contiguous: [N, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    launch(swiglu_kernel, (rows, -(-size // SWIGLU_BLOCK)), gate_up, out, SIZE=size, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def _row_options(size: int) -> dict[str, int]:
    block = next_power_of_2(size)
    return {"SIZE": size, "BLOCK": block, "num_warps": max(1, min(8, block // VALUES_PER_WARP))}
