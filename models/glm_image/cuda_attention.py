"""Attention of packed sequences on a GPU.

Queries are [T, H, D]; keys and values [2, rows, H, D]: those of a sequence's source images, then its own.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.device_copies import upload
from models.errors import first_line

# cuDNN plans each power of two, not each length (0.06 to 0.44 s). Needs contiguous [1, T, H, D].
os.environ.setdefault("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")

FA3_MODULE = "fa3_fwd_interface"  # of the package `fa3-fwd`
FA3 = "fa3"  # among the kernels, in logs and metrics
CHECK_LENGTHS, CHECK_SOURCES = (300, 65, 1, 700), (0, 130, 0, 5)
WARMED_PATCHES = (32 * 32, 64 * 64, 128 * 128)  # of 512x512, 1024x1024, 2048x2048


@dataclass(frozen=True)
class AttentionLayout:
    """Where sequences lie."""

    q_spans: tuple[tuple[int, int], ...]  # (start, end) by sequence
    kv_spans: tuple[tuple[int, int], ...]
    source_spans: tuple[tuple[int, int], ...]  # in keys and values
    kv_rows: Tensor  # [T] int32
    q_starts: Tensor  # [sequences + 1] int32, as kv_starts
    kv_starts: Tensor

    @property
    def rows(self) -> int:
        return self.kv_spans[-1][1]

    @classmethod
    def of(cls, lengths: Sequence[int], sources: Sequence[int], device: torch.device) -> "AttentionLayout":
        """Lay out sequences that attend to `sources` further tokens."""
        q_ends = [0, *accumulate(lengths)]
        kv_ends = [0, *accumulate(length + source for length, source in zip(lengths, sources, strict=True))]
        rows = torch.cat([torch.arange(end - length, end) for end, length in zip(kv_ends[1:], lengths, strict=True)])
        starts = zip(kv_ends, sources, strict=False)
        return cls(
            tuple(pairwise(q_ends)),
            tuple(pairwise(kv_ends)),
            tuple((start, start + source) for start, source in starts if source),
            *(upload(numbers.int(), device) for numbers in (rows, torch.tensor(q_ends), torch.tensor(kv_ends))),
        )


class PackedAttention(Protocol):
    """`SequenceAttention` or `VarlenAttention`."""

    def backends(self) -> AbstractContextManager[object]:
        """Select backends for many layers."""
        ...

    def __call__(self, q: Tensor, kv: Tensor, layout: AttentionLayout) -> Tensor:
        """Return [T, H * D]."""
        ...


class SequenceAttention:
    """SDPA by sequence, with an order of backends."""

    def __init__(self, order: Sequence[SDPBackend] | None = None):
        self._order = list(order or ())

    @contextmanager
    def backends(self) -> Iterator[None]:
        """Prefer the fastest backend."""
        with sdpa_kernel(self._order, set_priority=True) if self._order else nullcontext():
            yield

    def __call__(self, q: Tensor, kv: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend, whatever other sequences there are."""
        queries, keys, values = (x.unsqueeze(0).transpose(1, 2) for x in (q, *kv.unbind()))  # [1, H, rows, D]
        attended: list[Tensor] = []
        for (start, end), (kv_start, kv_end) in zip(layout.q_spans, layout.kv_spans, strict=True):
            query = queries.narrow(2, start, end - start)
            key, value = (x.narrow(2, kv_start, kv_end - kv_start) for x in (keys, values))
            attended.append(F.scaled_dot_product_attention(query, key, value).squeeze(0).transpose(0, 1))
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).flatten(1)


class VarlenAttention:
    """FlashAttention 3: one launch for all sequences."""

    def __init__(self, function: Any):
        self._function = function

    def backends(self) -> AbstractContextManager[object]:
        return nullcontext()

    def __call__(self, q: Tensor, kv: Tensor, layout: AttentionLayout) -> Tensor:
        longest, longest_kv = (max(end - start for start, end in spans) for spans in (layout.q_spans, layout.kv_spans))
        out = self._function(q, *kv.unbind(), layout.q_starts, layout.kv_starts, longest, longest_kv)
        return (out[0] if isinstance(out, tuple) else out).flatten(1)


def preferred_backends(capability: tuple[int, int]) -> list[SDPBackend]:
    """Order backends: from Hopper on cuDNN is faster (609 to 368 TFLOP/s)."""
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return [*(fast if capability >= (9, 0) else fast[::-1]), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose_attention(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[PackedAttention, dict[str, str]]:
    """Return the fastest attention, and why it is not FlashAttention 3 if that is installed."""
    if device.type != "cuda":
        return SequenceAttention(), {}
    default = SequenceAttention(preferred_backends(torch.cuda.get_device_capability(device)))
    try:
        candidate = VarlenAttention(importlib.import_module(FA3_MODULE).flash_attn_varlen_func)
    except ModuleNotFoundError as error:
        return default, {} if error.name == FA3_MODULE else {FA3: str(error)}
    except Exception as error:  # of a library built for another torch or card
        return default, {FA3: first_line(error)}
    failure = check_attention(candidate, default, heads, head_dim, dtype, device)
    return (default, {FA3: failure}) if failure else (candidate, {})


def check_attention(
    candidate: PackedAttention,
    default: PackedAttention,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Return why a candidate cannot be used."""
    layout = AttentionLayout.of(CHECK_LENGTHS, CHECK_SOURCES, device)
    q, kv = _random(layout, heads, head_dim, dtype, device)
    try:
        with default.backends():
            expected = default(2 * q, kv, layout).double()
        with candidate.backends():
            error = float((candidate(2 * q, kv, layout).double() - expected).abs().max())
    except Exception as error:
        return first_line(error)
    bound = max(1e-4, 6 * torch.finfo(dtype).eps)
    return None if error <= bound else f"differs from SDPA by {error:.2g}, more than {bound:.2g}"


def warm_attention(
    attend: PackedAttention, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Attend in the usual sizes: libraries keep their plans by thread."""
    for patches in WARMED_PATCHES:
        layout = AttentionLayout.of([patches + 1, patches + 1], [0, 0], device)  # a glyph token at least
        with attend.backends():
            attend(*_random(layout, heads, head_dim, dtype, device), layout)


def _random(
    layout: AttentionLayout, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(layout.q_spans[-1][1], heads, head_dim, generator=draw)
    kv = torch.randn(2, layout.rows, heads, head_dim, generator=draw)
    return q.to(device, dtype), kv.to(device, dtype)
