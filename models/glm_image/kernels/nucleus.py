"""Sampling of codes without a sort.

`top_k`, `top_p` and the uniform number each end a prefix of the codes by falling score: the shortest with some weight,
found by bisection of scores' bits, then of codes. The order of sums is fixed, so that they rise with the prefix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.glm_image.kernels.launch import launch, next_power_of_2

MAX_CODES = 32768
CODES_PER_WARP = 512
LOWEST = tl.constexpr(-0x80000000)  # key of what is left out
HIGHEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _key(score):
    """Map scores to integers of the same order."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(bits < 0, bits ^ HIGHEST, bits)


@triton.jit
def _score(key):
    return tl.where(key < 0, key ^ HIGHEST, key).to(tl.float32, bitcast=True)


@triton.jit
def _is_in(key, code, last, last_code):
    # This form needs the fewest registers.
    return key >= last + (code > last_code).to(tl.int32)


@triton.jit
def _shortest(key, code, weight, minimum):
    """Return the last key and code of the shortest prefix that weighs `minimum`, or of all codes."""
    last = tl.min(tl.where(key > LOWEST, key, HIGHEST), 0)
    high = tl.max(key, 0)
    while last < high:
        middle = (last | high) - ((last ^ high) >> 1)  # mean without overflow
        is_enough = tl.sum(tl.where(key >= middle, weight, 0.0), 0) >= minimum
        last = tl.where(is_enough, middle, last)
        high = tl.where(is_enough, high, middle - 1)
    first_code = tl.min(tl.where(key == last, code, HIGHEST), 0)
    last_code = tl.max(tl.where(key == last, code, 0), 0)
    while first_code < last_code:
        middle_code = (first_code + last_code) >> 1
        is_enough = tl.sum(tl.where(_is_in(key, code, last, middle_code), weight, 0.0), 0) >= minimum
        first_code = tl.where(is_enough, first_code, middle_code + 1)
        last_code = tl.where(is_enough, middle_code, last_code)
    return last, last_code


@triton.jit
def nucleus_kernel(
    logits, uniform, temperature, top_p, top_k, codes, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Choose the code of a row."""
    row, code = tl.program_id(0), tl.arange(0, BLOCK)
    exists = code < SIZE
    score = tl.load(logits + row.to(tl.int64) * stride + code, mask=exists, other=0.0).to(tl.float32)
    key = tl.where(exists, _key(score), LOWEST)
    if tl.load(temperature + row) == 0:
        chosen = tl.min(tl.where(key == tl.max(key, 0), code, HIGHEST), 0)
    else:
        count = tl.load(top_k + row)
        if (count > 0) & (count < SIZE):
            last, last_code = _shortest(key, code, (key > LOWEST).to(tl.float32), count.to(tl.float32))
            key = tl.where(_is_in(key, code, last, last_code), key, LOWEST)
        divisor = tl.load(temperature + row)
        highest = tl.div_rn(_score(tl.max(key, 0)), divisor)
        weight = tl.where(key > LOWEST, tl.exp(tl.div_rn(_score(key), divisor) - highest), 0.0)
        key = tl.where(weight > 0, key, LOWEST)
        share = tl.load(top_p + row)
        if share < 1:
            last, last_code = _shortest(key, code, weight, share * tl.sum(weight, 0))
            is_in = _is_in(key, code, last, last_code)
            key, weight = tl.where(is_in, key, LOWEST), tl.where(is_in, weight, 0.0)
        target = tl.load(uniform + row) * tl.sum(weight, 0)
        above = (target.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)  # next float
        _, chosen = _shortest(key, code, weight, above)
    tl.store(codes + row, tl.minimum(chosen, SIZE - 1).to(tl.int64))  # scores may not be finite


def nucleus(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Sample a code per row as `engine.planner.sampler.sample`, but for float32's errors in sums.

    Args:
        logits: [N, V], rows contiguous; other tensors are [N].
        top_k: int32; 0: all codes.

    Raises:
        ValueError: V is larger than `MAX_CODES`.
    """
    size = logits.shape[1]
    if size > MAX_CODES:
        raise ValueError(f"at most {MAX_CODES} codes can be sampled from, not {size}")
    codes = uniform.new_empty(len(logits), dtype=torch.int64)
    block = next_power_of_2(size)
    launch(
        nucleus_kernel, (len(logits),), logits, uniform, temperature, top_p, top_k, codes, logits.stride(0),
        SIZE=size, BLOCK=block, num_warps=max(1, min(32, block // CODES_PER_WARP)),
    )  # fmt: skip
    return codes
