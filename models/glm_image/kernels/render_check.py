"""Choose between each kernel of the renderer and torch, once when an engine starts."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.glm_image.config import RendererConfig
from models.glm_image.kernels import render_reference as reference
from models.glm_image.kernels.check import CheckSizes, difference, replace_verified, rounding_difference

INDEX = (0, 0, 1, 1, 1, 2, 3, 3, 0, 0, 3)  # vectors of the tokens of a check: changes within a program and between


@dataclass(frozen=True)
class RenderKernels:
    """Operations of a renderer layer: torch, except for kernels that were chosen."""

    modulate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = reference.modulate
    add_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = reference.add_modulate
    norm_rotate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = reference.norm_rotate
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.linear_gelu
    failures: dict[str, str] = field(default_factory=dict)  # by kernel: why torch replaces it


@dataclass(frozen=True)
class _Sizes(CheckSizes):
    config: RendererConfig

    @property
    def index(self) -> Tensor:
        return self.integers(*INDEX)


def choose_render_kernels(config: RendererConfig, dtype: torch.dtype, device: torch.device) -> RenderKernels:
    """Return the kernels that run on a device and agree with torch in the sizes of a renderer."""
    return replace_verified(RenderKernels(), load, CHECKS, _Sizes(dtype, device, config))


def load(name: str) -> Any:
    """Import a kernel, and Triton with it."""
    if name == "linear_gelu":
        return linear_gelu
    return getattr(importlib.import_module("models.glm_image.kernels.render_layer"), name)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Activate in the product's epilogue (cuBLASLt), without a pass over memory."""
    return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _check_modulate(kernel: Any, sizes: _Sizes) -> str | None:
    x, vectors = sizes.random(len(INDEX), sizes.config.dim), sizes.random(2, 4, sizes.config.dim)
    shift, scale = vectors.double()
    expected = reference.modulate(x.double(), shift, scale, sizes.index)
    return rounding_difference(kernel(x, *vectors, sizes.index), expected.to(sizes.dtype))


def _check_add_modulate(kernel: Any, sizes: _Sizes) -> str | None:
    x, delta = sizes.random(2, len(INDEX), sizes.config.dim)
    vectors = sizes.random(3, 4, sizes.config.dim)
    gate, shift, scale = vectors.double()
    total = (x.double() + delta.double() * gate[sizes.index]).to(sizes.dtype)  # rounded before it is normalised
    expected = torch.cat([total, reference.modulate(total.double(), shift, scale, sizes.index).to(sizes.dtype)])
    out = kernel(x, delta, *vectors, sizes.index)
    return rounding_difference(torch.cat([x, out]), expected)


def _check_norm_rotate(kernel: Any, sizes: _Sizes) -> str | None:
    heads, head_dim = sizes.config.num_attention_heads, sizes.config.attention_head_dim
    tokens = len(INDEX)
    qkv = sizes.random(tokens, 3 * heads * head_dim)
    angles = sizes.random(tokens, head_dim // 2).float().repeat(1, 2)
    rows = (2 * torch.arange(tokens, device=sizes.device) + 1).int()

    def run(function: Any, dtype: torch.dtype) -> Tensor:
        q, kv = qkv.new_zeros(tokens, heads, head_dim, dtype=dtype), qkv.new_zeros(2, 2 * tokens, heads, head_dim)
        kv = kv.to(dtype)
        function(qkv.to(dtype), angles.cos(), angles.sin(), rows, q, kv)
        return torch.cat([q, *kv])

    return rounding_difference(run(kernel, sizes.dtype), run(reference.norm_rotate, torch.float64).to(sizes.dtype))


def _check_linear_gelu(kernel: Any, sizes: _Sizes) -> str | None:
    x, width = sizes.random(len(INDEX), sizes.config.dim), 4 * sizes.config.dim
    weight, bias = sizes.random(width, sizes.config.dim) / sizes.config.dim**0.5, sizes.random(width)
    expected = reference.linear_gelu(x.double(), weight.double(), bias.double())
    scale = 1 + expected.abs()
    bound = max(5e-5, 6 * torch.finfo(sizes.dtype).eps)  # sums of tensor cores round in between
    return difference(kernel(x, weight, bias).double() / scale, expected / scale, bound)


CHECKS: dict[str, Callable[[Any, _Sizes], str | None]] = {
    "modulate": _check_modulate,
    "add_modulate": _check_add_modulate,
    "norm_rotate": _check_norm_rotate,
    "linear_gelu": _check_linear_gelu,
}
