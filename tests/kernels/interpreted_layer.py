"""Elementwise kernels of a layer under Triton's interpreter (run by `test_interpreted.py`)."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.glm_image.kernels import layer, reference
from models.glm_image.planner import rotate
from tests.kernels import INTERPRETED

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)


def random_tensor(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=draw)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare; the interpreter cuts bfloat16 off where torch rounds."""
    assert actual.dtype == expected.dtype
    rtol = 3e-6 if actual.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=2 * rtol * float(expected.abs().max()))


Operation = Callable[[Tensor, int], Tensor]  # rows [N, 2C] and a seed: [N, ...]


def _norm(kernels: object) -> Operation:
    def run(x: Tensor, seed: int) -> Tensor:
        weight = random_tensor(x.shape[1], seed=seed, dtype=x.dtype)
        return kernels.rms_norm(x, weight, EPS)  # type: ignore[attr-defined]

    return run


def _add(kernels: object) -> Operation:
    def run(x: Tensor, seed: int) -> Tensor:
        first, second = (half.contiguous() for half in x.chunk(2, dim=1))
        weights = random_tensor(2, first.shape[1], seed=seed, dtype=x.dtype)
        return torch.cat(kernels.add_rms_norm(first, second, weights[0], weights[1], EPS), dim=1)  # type: ignore[attr-defined]

    return run


def _swiglu(kernels: object) -> Operation:
    return lambda x, _: kernels.swiglu(x)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # SiLU of very negative values is 0, as in torch
@pytest.mark.parametrize("operation", [_norm, _add, _swiglu])
@settings(INTERPRETED, max_examples=10)
@given(st.integers(1, 4), st.sampled_from((8, 96, 192, 600, 1300)), st.sampled_from((0.01, 1, 30)), dtypes, seeds)
def test_rows(
    operation: Callable[[object], Operation], rows: int, size: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    x = random_tensor(rows, 2 * size, seed=seed, dtype=dtype, scale=scale)
    actual = operation(layer)(x, seed)
    assert_close(actual, operation(reference)(x, seed))
    for i in range(rows):
        assert torch.equal(operation(layer)(x[i : i + 1].contiguous(), seed)[0], actual[i])


SHAPES = [(4, 2, 16, 8), (2, 1, 64, 32), (3, 3, 24, 24), (16, 1, 32, 0), (1, 1, 128, 64)]  # H, G, D, R


@settings(INTERPRETED, max_examples=10)
@given(st.integers(1, 4), st.sampled_from(SHAPES), dtypes, st.booleans(), seeds)
def test_rotate_and_write(
    rows: int, shape: tuple[int, int, int, int], dtype: torch.dtype, has_float32_angles: bool, seed: int
) -> None:
    heads, groups, head_dim, rotary_dim = shape
    qkv = random_tensor(rows, (heads + 2 * groups) * head_dim, seed=seed, dtype=dtype)
    angle = random_tensor(rows, rotary_dim // 2, seed=seed + 1, dtype=torch.float32, scale=100).repeat(1, 2)
    cos, sin = (x.to(torch.float32 if has_float32_angles else dtype) for x in (angle.cos(), angle.sin()))
    slots = torch.randperm(3 * 16, generator=torch.Generator().manual_seed(seed))[:rows]
    results = []
    for kernels in (layer, reference):
        cache = torch.full((3, 16, 2, groups, head_dim), torch.nan, dtype=dtype)
        results.append((kernels.rotate_and_write(qkv, cos, sin, cache, slots), cache))
    (q, cache), (reference_q, reference_cache) = results
    untouched = torch.ones(3 * 16, dtype=torch.bool).index_fill_(0, slots, False)
    assert cache.flatten(0, 1)[untouched].isnan().all()
    assert_close(q, reference_q)
    assert_close(cache.flatten(0, 1)[slots], reference_cache.flatten(0, 1)[slots])
    if dtype == torch.float32:
        assert torch.equal(q, reference_q)
        assert torch.equal(cache.flatten(0, 1)[slots], reference_cache.flatten(0, 1)[slots])


@settings(INTERPRETED, max_examples=10)
@given(st.sampled_from(SHAPES), dtypes, seeds)
def test_the_reference_rotates_as_the_planner(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
    heads, groups, head_dim, rotary_dim = shape
    x = random_tensor(5, heads + 2 * groups, head_dim, seed=seed, dtype=dtype)
    cos, sin = random_tensor(2, 5, rotary_dim // 2, seed=seed, dtype=dtype).repeat(1, 1, 2)
    cache = torch.zeros(1, 16, 2, groups, head_dim, dtype=dtype)
    q = reference.rotate_and_write(x.flatten(1), cos, sin, cache, torch.arange(3, 8))
    expected = rotate(x[:, : heads + groups], (cos, sin))
    assert torch.equal(q, expected[:, :heads])
    assert torch.equal(cache[0, 3:8, 0], expected[:, heads:])
    assert torch.equal(cache[0, 3:8, 1], x[:, heads + groups :])
