"""The choice between kernels and torch under Triton's interpreter (run by `test_interpreted.py`)."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.glm_image.config import PlannerConfig
from models.glm_image.kernels import check, reference
from models.glm_image.kernels.check import CHECKS, DecodeKernels, choose_kernels, load

CONFIG = PlannerConfig(
    hidden_size=96, intermediate_size=160, num_attention_heads=4, head_dim=16, codebook_size=200, vision_vocab_size=210
)
TORCH = DecodeKernels()


def choose() -> DecodeKernels:
    return choose_kernels(CONFIG, torch.float32, torch.device("cpu"), block_size=16, max_length=600)


def test_all_kernels_are_chosen() -> None:
    chosen = choose()
    assert chosen.failures == {}
    for name in CHECKS:
        assert getattr(chosen, name) is load(name)
        assert getattr(chosen, name) is not getattr(TORCH, name)


def spoil(value: Any) -> Any:
    """Change a result a little; a sampled code to another one."""
    if isinstance(value, tuple):
        return value[0], spoil(value[1])
    if value.dtype == torch.int64:
        return (value + 1) % CONFIG.codebook_size
    return value + 0.001 * torch.nn.functional.one_hot(torch.tensor(value.numel() - 1)).view(value.shape)


class SpoiledAttention(reference.PagedDecode):
    def __call__(self, *arguments: Any) -> Tensor:
        return spoil(super().__call__(*arguments))


class ForgetfulAttention(reference.PagedDecode):
    def __call__(self, layer: int, q: Tensor, tables: Tensor, row_sequence: Tensor, lengths: Tensor) -> Tensor:
        """Leave out the last token."""
        return super().__call__(layer, q, tables, row_sequence, (lengths - 1).clamp_min(1))


def spoiled(name: str) -> Any:
    right = getattr(TORCH, name)
    return SpoiledAttention if name == "paged_decode" else lambda *arguments: spoil(right(*arguments))


def broken(name: str) -> Any:
    def fail(*arguments: object) -> None:
        raise RuntimeError(f"{name} does not compile\nfor many reasons")

    return fail


def forgets_to_write(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    return reference.rotate_and_write(qkv, cos, sin, cache.clone(), slots)


def not_a_number(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.full_like(x, torch.nan)


WRONG = {
    **{f"spoiled {name}": (name, spoiled(name)) for name in CHECKS},
    **{f"broken {name}": (name, broken(name)) for name in CHECKS},
    "forgetful attention": ("paged_decode", ForgetfulAttention),
    "no write": ("rotate_and_write", forgets_to_write),
    "nan": ("rms_norm", not_a_number),
}


@pytest.mark.parametrize("case", WRONG)
def test_torch_replaces_a_kernel_that_fails_or_disagrees(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, kernel = WRONG[case]
    monkeypatch.setattr(check, "load", lambda name: kernel if name == wrong else getattr(TORCH, name))
    chosen = choose()
    assert list(chosen.failures) == [wrong]
    reason = f"RuntimeError: {wrong} does not compile" if "broken" in case else "torch"
    assert reason in chosen.failures[wrong]
    assert "\n" not in chosen.failures[wrong]
    assert dataclasses.replace(chosen, failures={}) == TORCH


def test_without_triton_torch_replaces_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(check, "load", fail)
    chosen = choose()
    assert list(chosen.failures) == list(CHECKS)
    assert dataclasses.replace(chosen, failures={}) == TORCH
