"""The renderer's kernels under Triton's interpreter, and the choice between them and torch (run by
`test_interpreted.py`).
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.glm_image.config import RendererConfig
from models.glm_image.cuda_attention import SequenceAttention
from models.glm_image.fused_renderer import FusedRenderer
from models.glm_image.kernels import render_check, render_layer
from models.glm_image.kernels import render_reference as reference
from models.glm_image.kernels.render_check import CHECKS, RenderKernels, choose_render_kernels, load
from models.glm_image.random_weights import randomise
from models.glm_image.renderer import Renderer, RendererBatch, rotary_angles, stack_modulations
from tests.kernels import INTERPRETED
from tests.kernels.interpreted_layer import assert_close, dtypes, random_tensor, seeds

CONFIG = RendererConfig(num_layers=2, num_attention_heads=3, attention_head_dim=24, time_embed_dim=32, condition_dim=8)
TORCH = RenderKernels()


def rounded(function: Any, dtype: torch.dtype, *arguments: Tensor) -> Tensor:
    """Compute in float64; round at the end."""
    return function(*(x.double() if x.is_floating_point() else x for x in arguments)).to(dtype)


@st.composite
def modulated(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x, delta [T, C], vectors [3, 2n, C] and an index [T] of runs, as packed branches have."""
    dtype, seed, size = draw(dtypes), draw(seeds), draw(st.sampled_from((8, 96, 192, 600, 1300)))
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=6))
    index = torch.tensor([line for line, length in runs for _ in range(length)], dtype=torch.int32)
    x = random_tensor(len(index), size, seed=seed, dtype=dtype, scale=draw(st.sampled_from((0.1, 1, 30))))
    delta = random_tensor(len(index), size, seed=seed + 1, dtype=dtype)
    return x, delta, random_tensor(3, 6, size, seed=seed + 2, dtype=dtype), index


@settings(INTERPRETED, max_examples=15)
@given(modulated())
def test_modulate(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, (_, shift, scale), index = case
    actual = render_layer.modulate(x, shift, scale, index)
    assert_close(actual, rounded(reference.modulate, x.dtype, x, shift, scale, index))
    for i in range(0, len(x), 3):
        alone = render_layer.modulate(x[i : i + 1], shift, scale, index[i : i + 1])
        assert torch.equal(alone[0], actual[i]), "a token's bits depend on no other token"


@settings(INTERPRETED, max_examples=15)
@given(modulated())
def test_add_modulate(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, delta, (gate, shift, scale), index = case
    total, branch = x.clone(), delta.clone()
    out = render_layer.add_modulate(total, branch, gate, shift, scale, index)
    assert out.data_ptr() == branch.data_ptr(), "nothing is allocated"
    assert_close(total, (x.double() + delta.double() * gate[index].double()).to(x.dtype))
    assert_close(out, rounded(reference.modulate, x.dtype, total, shift, scale, index))


@settings(INTERPRETED, max_examples=15)
@given(
    st.integers(1, 9), st.sampled_from([(4, 16), (3, 24), (1, 64), (5, 128)]), st.integers(0, 6), dtypes, st.randoms()
)
def test_norm_rotate(tokens: int, shape: tuple[int, int], sources: int, dtype: torch.dtype, chance: Any) -> None:
    heads, head_dim = shape
    seed = chance.getrandbits(32)
    qkv = random_tensor(tokens, 3 * heads * head_dim, seed=seed, dtype=dtype, scale=3)
    angles = random_tensor(tokens, head_dim // 2, seed=seed + 1, dtype=torch.float32, scale=100).repeat(1, 2)
    rows = torch.tensor(chance.sample(range(tokens + sources), tokens), dtype=torch.int32)
    results = []
    for function, kind in ((render_layer.norm_rotate, dtype), (reference.norm_rotate, torch.float64)):
        q = torch.full((tokens, heads, head_dim), torch.nan, dtype=kind)
        kv = torch.full((2, tokens + sources, heads, head_dim), torch.nan, dtype=kind)
        function(qkv.to(kind), angles.cos(), angles.sin(), rows, q, kv)
        results.append((q, kv))
    (q, kv), (expected_q, expected_kv) = results
    untouched = torch.ones(tokens + sources, dtype=torch.bool).index_fill_(0, rows.long(), False)
    assert kv[:, untouched].isnan().all()
    assert_close(q, expected_q.to(dtype))
    assert_close(kv[:, rows.long()], expected_kv[:, rows.long()].to(dtype))
    assert torch.equal(kv[1, rows.long()].flatten(1), qkv[:, 2 * heads * head_dim :])


# --- the choice


def choose() -> RenderKernels:
    return choose_render_kernels(CONFIG, torch.float32, torch.device("cpu"))


def test_kernels_are_chosen_but_what_computes_another_gelu() -> None:
    """The epilogue's GELU on a CPU is the exact one: the check has to tell it from tanh's."""
    chosen = choose()
    assert chosen.failures.keys() == {"linear_gelu"}
    assert "differs from torch" in chosen.failures["linear_gelu"]
    for name in CHECKS.keys() - chosen.failures:
        assert getattr(chosen, name) is load(name)
        assert getattr(chosen, name) is not getattr(TORCH, name)


def one_off(*arguments: Any) -> Any:
    """Take the vectors of the next line."""
    *rest, index = arguments
    function: Any = TORCH.modulate if len(rest) == 3 else TORCH.add_modulate
    return function(*rest, (index + 1) % 4)


def forgets_the_sum(x: Tensor, *arguments: Any) -> Tensor:
    return TORCH.add_modulate(x.clone(), *arguments)


def rotates_backwards(qkv: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
    TORCH.norm_rotate(qkv, cos, -sin, *rest)


def forgets_values(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, q: Tensor, kv: Tensor) -> None:
    TORCH.norm_rotate(qkv, cos, sin, rows, q, kv)
    kv[1] = 0


def without_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def broken(*arguments: object) -> None:
    raise RuntimeError("does not compile\nfor many reasons")


WRONG = {
    "line of a modulation": ("modulate", one_off),
    "line of a gate": ("add_modulate", one_off),
    "sum": ("add_modulate", forgets_the_sum),
    "rotation": ("norm_rotate", rotates_backwards),
    "values": ("norm_rotate", forgets_values),
    "activation": ("linear_gelu", without_activation),
    **{f"broken {name}": (name, broken) for name in CHECKS},
}


@pytest.mark.parametrize("case", WRONG)
def test_torch_replaces_a_kernel_that_fails_or_disagrees(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, kernel = WRONG[case]
    monkeypatch.setattr(render_check, "load", lambda name: kernel if name == wrong else getattr(TORCH, name))
    chosen = choose()
    assert list(chosen.failures) == [wrong]
    assert "\n" not in chosen.failures[wrong]
    assert dataclasses.replace(chosen, failures={}) == TORCH


# --- the whole network


@torch.inference_mode()
def test_the_renderer_with_kernels_is_the_renderer() -> None:
    """Render three images of several lengths, one with a source image and one without guidance."""
    model = Renderer(CONFIG)
    randomise(model, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    branches = [(0, 5, 4, 6), (0, 1, 4, 6), (1, 3, 2, 8), (2, 2, 2, 2)]  # image, glyph tokens, rows, columns
    lengths = [glyphs + rows * cols for _, glyphs, rows, cols in branches]
    angles = torch.cat(
        [torch.cat([torch.zeros(glyphs, 24), rotary_angles(rows, cols, 24)]) for _, glyphs, rows, cols in branches]
    )
    index = torch.tensor(
        [2 * image + (i < glyphs) for (image, glyphs, r, c) in branches for i in range(glyphs + r * c)]
    )
    source_kv = [random_tensor(2, 2, 3, 7, 24, seed=5, dtype=torch.float32), None, None, None]
    batch = RendererBatch(lengths, index, angles.cos(), angles.sin(), source_kv=source_kv)
    x = random_tensor(sum(lengths), CONFIG.dim, seed=3, dtype=torch.float32)
    temb = model.time_embeddings(torch.tensor([900.0, 400.0, 10.0]), 64, 96)
    modulations = stack_modulations(model.modulations(temb))
    expected = model(x.clone(), modulations, batch)
    fused = FusedRenderer(model, choose(), SequenceAttention())
    for _ in range(2):  # with a layout of its own, and the last one
        torch.testing.assert_close(fused(x.clone(), modulations, batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.clone(), modulations, batch), expected, rtol=0, atol=0)
