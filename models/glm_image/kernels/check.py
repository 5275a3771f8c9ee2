"""Choose between each kernel and torch, once when an engine starts.

kernels = choose_kernels(config, torch.bfloat16, device, block_size=32, max_length=6400)
attend = kernels.paged_decode(kv.pool, kv.group, 6400, 64)
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from models.errors import first_line
from models.glm_image.config import PlannerConfig
from models.glm_image.kernels import reference

Ops = TypeVar("Ops", bound="Operations")
S = TypeVar("S", bound="CheckSizes")

ROWS = 6
MASS_ERROR = 1e-5  # of a float32 sum of probabilities


class Operations(Protocol):
    """A dataclass of operations, each a kernel's or torch's."""

    @property
    def failures(self) -> dict[str, str]:
        """Return, by kernel, why torch replaces it."""
        ...


class PagedAttention(Protocol):
    def __call__(self, layer: int, q: Tensor, tables: Tensor, row_sequence: Tensor, lengths: Tensor) -> Tensor:
        """Attend as `paged_decode.PagedDecode`."""
        ...


@dataclass(frozen=True)
class DecodeKernels:
    """Operations of a decode step: torch, except for kernels that were chosen."""

    paged_decode: Callable[[Tensor, int, int, int], PagedAttention] = reference.PagedDecode
    rotate_and_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = reference.rotate_and_write
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = reference.add_rms_norm
    swiglu: Callable[[Tensor], Tensor] = reference.swiglu
    nucleus: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = reference.nucleus
    failures: dict[str, str] = field(default_factory=dict)  # by kernel: why torch replaces it


@dataclass(frozen=True)
class CheckSizes:
    """Where and in which precision kernels are checked."""

    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw on the CPU: the same numbers everywhere."""
        numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
        return numbers.to(self.device, dtype or self.dtype)

    def integers(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return values on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class _Sizes(CheckSizes):
    config: PlannerConfig
    block_size: int
    max_length: int


def choose_kernels(
    config: PlannerConfig, dtype: torch.dtype, device: torch.device, *, block_size: int, max_length: int
) -> DecodeKernels:
    """Return the kernels that run on a device and agree with torch in the sizes of a planner and its cache.

    Args:
        max_length: of a prompt and its plan in tokens.
    """
    return replace_verified(DecodeKernels(), load, CHECKS, _Sizes(dtype, device, config, block_size, max_length))


def replace_verified(
    operations: Ops, load: Callable[[str], Any], checks: Mapping[str, Callable[[Any, S], str | None]], sizes: S
) -> Ops:
    """Replace operations by the kernels that load and pass their check; record the failures of others.

    On other devices than CUDA, replace none: that is no failure. Waits for the device.
    """
    if sizes.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return operations
    for name, check in checks.items():
        try:
            kernel = load(name)
            error = check(kernel, sizes)
        except Exception as e:  # of Triton, its C compiler, the driver
            kernel, error = None, first_line(e)
        if error is None:
            operations = dataclasses.replace(operations, **{name: kernel})  # type: ignore[type-var]
        else:
            operations.failures[name] = error
    return operations


def load(name: str) -> Any:
    """Import a kernel, and Triton with it."""
    modules = {"paged_decode": "paged_decode", "nucleus": "nucleus"}
    module = importlib.import_module(f"models.glm_image.kernels.{modules.get(name, 'layer')}")
    return module.PagedDecode if name == "paged_decode" else getattr(module, name)


def _check_paged_decode(kernel: Any, sizes: _Sizes) -> str | None:
    groups, head_dim = sizes.config.num_key_value_heads, sizes.config.head_dim
    group, blocks = sizes.config.num_attention_heads // groups, -(-sizes.max_length // sizes.block_size)
    pool = sizes.random(2, 2 * blocks, sizes.block_size, 2, groups, head_dim)
    q = 3 * sizes.random(ROWS, groups * group, head_dim)  # so that a token or two have most of the weight
    tables = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0)).view(2, blocks)
    lengths = [min(n, sizes.max_length) for n in (1, 257, sizes.max_length // 2, 100, sizes.max_length - 1, 10**9)]
    rows = tables.to(sizes.device, torch.int32), sizes.integers(0, 0, 0, 1, 1, 1), sizes.integers(*lengths)
    attended = kernel(pool, group, sizes.max_length, ROWS)(1, q, *rows)
    expected = reference.PagedDecode(pool.double(), group, sizes.max_length, ROWS)(1, q.double(), *rows)
    return difference(attended, expected, max(1e-4, 6 * torch.finfo(sizes.dtype).eps))


def _check_rotate_and_write(kernel: Any, sizes: _Sizes) -> str | None:
    groups, head_dim = sizes.config.num_key_value_heads, sizes.config.head_dim
    qkv = sizes.random(ROWS, (sizes.config.num_attention_heads + 2 * groups) * head_dim)
    cos, sin = sizes.random(2, ROWS, sizes.config.rotary_dim // 2).repeat(1, 1, 2).clamp(-1, 1)
    slots = sizes.integers(*range(1, 1 + 3 * ROWS, 3), dtype=torch.int64)

    def run(function: Any) -> Tensor:
        cache = qkv.new_zeros(3 * ROWS, sizes.block_size, 2, groups, head_dim)
        return torch.cat([function(qkv, cos, sin, cache, slots).flatten(), cache.flatten()])

    return rounding_difference(run(kernel), run(reference.rotate_and_write))


def _check_rms_norm(kernel: Any, sizes: _Sizes) -> str | None:
    x, weight = sizes.random(ROWS, sizes.config.hidden_size), sizes.random(sizes.config.hidden_size)
    arguments = x, weight, sizes.config.rms_norm_eps
    return rounding_difference(kernel(*arguments), reference.rms_norm(*arguments))


def _check_add_rms_norm(kernel: Any, sizes: _Sizes) -> str | None:
    x, delta = sizes.random(2, ROWS, sizes.config.hidden_size)
    weights = sizes.random(2, sizes.config.hidden_size)
    arguments = x, 10 * delta, weights[0], weights[1], sizes.config.rms_norm_eps
    return rounding_difference(torch.cat(kernel(*arguments)), torch.cat(reference.add_rms_norm(*arguments)))


def _check_swiglu(kernel: Any, sizes: _Sizes) -> str | None:
    gate_up = 3 * sizes.random(ROWS, 2 * sizes.config.intermediate_size)
    return rounding_difference(kernel(gate_up), reference.swiglu(gate_up))


def _check_nucleus(kernel: Any, sizes: _Sizes) -> str | None:
    """Compare with sums in float64, where a target within `MASS_ERROR` of a boundary may go to either side."""
    settings = [(t, p, k) for t in (0.0, 0.5, 1.0) for p in (0.75, 1.0) for k in (0, 50)]
    temperature, top_p, top_k = (torch.tensor(x, device=sizes.device) for x in zip(*settings, strict=True))
    uniform = torch.linspace(0, 0.999, len(settings), device=sizes.device)
    outputs = 3 * sizes.random(len(settings), sizes.config.vision_vocab_size)
    logits = outputs[:, : sizes.config.codebook_size]
    codes = kernel(logits, uniform, temperature, top_p, top_k.int()).tolist()
    for row, setting in enumerate(settings):
        if not _may_be_sampled(logits[row].double(), float(uniform[row]), *setting, code=codes[row]):
            return f"samples code {codes[row]}, which torch does not"
    return None


def _may_be_sampled(logits: Tensor, uniform: float, temperature: float, top_p: float, top_k: int, *, code: int) -> bool:
    order = logits.sort(descending=True, stable=True).indices[: top_k or None]
    if temperature == 0:
        return code == int(order[0])
    probability = (logits[order] / temperature).softmax(0)
    before = probability.cumsum(0) - probability
    if code not in order:
        return False
    place = int((order == code).nonzero())
    for error in (-MASS_ERROR, MASS_ERROR):
        kept = max(1, int((before < top_p + error).sum()))
        target = uniform * float(probability[:kept].sum())
        if place < kept and before[place] - MASS_ERROR <= target <= before[place] + probability[place] + MASS_ERROR:
            return True
    return False


def rounding_difference(actual: Tensor, expected: Tensor) -> str | None:
    """Return how results differ by more than two roundings of expected's dtype."""
    scale = 1 + expected.double().abs()
    return difference(actual / scale, expected / scale, max(1e-5, 2 * torch.finfo(expected.dtype).eps))


def difference(actual: Tensor, expected: Tensor, bound: float) -> str | None:
    """Return how results differ, or None within `bound`."""
    largest = float((actual.double() - expected.double()).abs().max())
    return None if largest <= bound else f"differs from torch by {largest:.2g}, more than {bound:.2g}"


CHECKS: dict[str, Callable[[Any, _Sizes], str | None]] = {
    "paged_decode": _check_paged_decode,
    "rotate_and_write": _check_rotate_and_write,
    "rms_norm": _check_rms_norm,
    "add_rms_norm": _check_add_rms_norm,
    "swiglu": _check_swiglu,
    "nucleus": _check_nucleus,
}
