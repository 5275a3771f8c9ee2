"""Weights get to a device without a second copy of them in memory."""

from pathlib import Path

import pytest
import torch

from benchmarks.loading import load_in_process, write_checkpoint
from models.checkpoint import FINGERPRINT_CHUNK, SUMMED_AT_ONCE, _sums

BYTES = 300_000_000


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("large"), BYTES)


def test_weights_of_the_files_dtype_are_not_copied(large_checkpoint: Path) -> None:
    loaded = load_in_process(large_checkpoint, "float32", "cpu")
    assert loaded.weights > 0.8 * BYTES
    assert loaded.peak < 1.35 * loaded.weights
    assert loaded.anonymous < 0.1 * loaded.weights, "they are maps of the files"


def test_weights_of_another_dtype_are_converted_one_by_one(large_checkpoint: Path) -> None:
    loaded = load_in_process(large_checkpoint, "bfloat16", "cpu")
    mapped = 2 * loaded.weights
    assert loaded.peak - mapped < 1.35 * loaded.weights
    assert loaded.anonymous < 1.1 * loaded.weights


@pytest.mark.parametrize("size", [0, 1, SUMMED_AT_ONCE + 3, FINGERPRINT_CHUNK + 2 * SUMMED_AT_ONCE + 7])
def test_a_digest_does_not_depend_on_how_many_values_are_summed_at_once(size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size))
    chunks = tensor.view(torch.int32).split(FINGERPRINT_CHUNK)
    assert _sums(tensor) == [int((torch.arange(1, 2 * len(chunk) + 1, 2) * chunk).sum()) for chunk in chunks]
