"""Attention of packed sequences as a GPU's ticks ask for it, computed on a CPU."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from models.glm_image import cuda_attention
from models.glm_image.cuda_attention import (
    FA3,
    AttentionLayout,
    SequenceAttention,
    VarlenAttention,
    check_attention,
    choose_attention,
    preferred_backends,
    warm_attention,
)

CPU = torch.device("cpu")
SIZES = 2, 16, torch.float32, CPU  # heads, their dimension


def varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Attend as FlashAttention's function of this signature."""
    out = torch.empty_like(q)
    q_ends, k_ends = q_starts.tolist(), k_starts.tolist()
    assert longest_q == max(end - start for start, end in pairwise(q_ends))
    assert longest_k == max(end - start for start, end in pairwise(k_ends))
    for i in range(len(q_ends) - 1):
        query = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        key, value = (x[k_ends[i] : k_ends[i + 1]].transpose(0, 1) for x in (k, v))
        out[q_ends[i] : q_ends[i + 1]] = F.scaled_dot_product_attention(query, key, value).transpose(0, 1)
    return out


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=5), st.integers(0, 2**32))
def test_sequences_attend_to_their_sources_and_themselves_alone(sequences: list[tuple[int, int]], seed: int) -> None:
    lengths, sources = (list(numbers) for numbers in zip(*sequences, strict=True))
    layout = AttentionLayout.of(lengths, sources, CPU)
    draw = torch.Generator().manual_seed(seed)
    q, own, sourced = (torch.randn(3, n, 2, 16, generator=draw) for n in (sum(lengths), sum(lengths), sum(sources)))
    kv = torch.full((2, layout.rows, 2, 16), torch.nan)
    kv[:, layout.kv_rows.long()] = own[:2]
    at = 0
    for start, end in layout.source_spans:
        kv[:, start:end] = sourced[:2, at : at + end - start]
        at += end - start
    assert kv.isfinite().all(), "every row belongs to a token"
    attended = SequenceAttention()(q[0], kv, layout)
    torch.testing.assert_close(VarlenAttention(varlen)(q[0], kv, layout), attended)
    start = source_start = 0
    for length, source in sequences:
        keys, values = (
            torch.cat([sourced[i, source_start : source_start + source], own[i, start : start + length]])
            for i in range(2)
        )
        query, key, value = (x.transpose(0, 1) for x in (q[0, start : start + length], keys, values))
        alone = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(attended[start : start + length], alone.transpose(0, 1).flatten(1))
        start, source_start = start + length, source_start + source


def forgets_sources(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *longest: int) -> Tensor:
    return varlen(q, k, v, q_starts, torch.cat([k_starts[:-1], k_starts[-1:] - 5]), longest[0], 700)


def fails(*arguments: Any) -> Tensor:
    raise RuntimeError("built for another torch\nand more")


@pytest.mark.parametrize(
    ("function", "failure"),
    [(varlen, None), (forgets_sources, "differs from SDPA"), (fails, "RuntimeError: built for")],
)
def test_flash_attention_is_used_if_it_agrees(
    function: Any, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretend that there is a GPU of compute capability 9.0, which computes as this CPU."""
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_varlen_func=function))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check = cuda_attention.check_attention
    monkeypatch.setattr(
        cuda_attention, "check_attention", lambda candidate, default, *_: check(candidate, default, *SIZES)
    )
    attend, failures = choose_attention(*SIZES[:-1], torch.device("cuda"))
    assert isinstance(attend, SequenceAttention if failure else VarlenAttention)
    assert list(failures) == ([FA3] if failure else [])
    assert failure is None or (failures[FA3].startswith(failure) and "\n" not in failures[FA3])


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "ImportError: libcudart.so.13"),
        ("import einops_is_missing", "No module named 'einops_is_missing'"),
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for"),
    ],
)
def test_an_installed_library_that_cannot_be_imported_is_named(
    code: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fa3_fwd_interface.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attend, failures = choose_attention(*SIZES[:-1], torch.device("cuda"))
    assert isinstance(attend, SequenceAttention)
    assert failures[FA3].startswith(failure)


def test_without_it_backends_are_ordered_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    attend, failures = choose_attention(*SIZES[:-1], torch.device("cuda"))
    assert isinstance(attend, SequenceAttention)
    assert failures == {}
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    for capability in ((8, 0), (8, 9)):
        assert preferred_backends(capability)[:2] == [flash, cudnn]
    for capability in ((9, 0), (10, 0), (12, 0)):
        assert preferred_backends(capability)[:2] == [cudnn, flash]
        assert SDPBackend.MATH in preferred_backends(capability), "some backend takes any shape"


def test_a_backend_that_cannot_run_is_passed_over() -> None:
    assert check_attention(SequenceAttention(preferred_backends((9, 0))), SequenceAttention(), *SIZES) is None


def test_usual_sizes_are_attended_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "WARMED_PATCHES", (64, 256))
    seen: list[tuple[int, ...]] = []

    class Recorded(SequenceAttention):
        def __call__(self, q: Tensor, kv: Tensor, layout: AttentionLayout) -> Tensor:
            assert all(x[None].is_contiguous() for x in (q, *kv)), "cuDNN's plans serve other lengths then"
            seen.append(tuple(end - start for start, end in layout.q_spans))
            return super().__call__(q, kv, layout)

    warm_attention(Recorded(), *SIZES)
    assert seen == [(65, 65), (257, 257)]
