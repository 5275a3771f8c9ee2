"""The arithmetic that byte-equal images depend on."""

import pytest
import torch
import torch.nn.functional as F

from models.batch_invariant import GRAIN, Linear, elementwise, padded
from models.glm_image.model import GlmImage
from models.threads import threads
from tests.checkpoints import small_engine

CPU = torch.device("cpu")


@pytest.fixture(name="threads", params=[1, 2, 3])
def on_threads(request: pytest.FixtureRequest):
    with threads(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 96, 256, 1024])
def test_a_row_of_a_product_depends_on_neither_its_position_nor_other_rows(
    threads: int, dtype: torch.dtype, features: int
) -> None:
    layer = Linear(features, 192).to(dtype)
    with torch.inference_mode():
        rows = torch.randn(300, features, dtype=dtype)
        alone = torch.cat([layer(F.pad(row[None], (0, 0, 0, 127)), 128)[:1] for row in rows[:20]])
        together = layer(F.pad(rows, (0, 0, 0, padded(300, 128) - 300)), 128)
        shuffled = torch.randperm(384)
        moved = layer(F.pad(rows, (0, 0, 0, 84))[shuffled], 128)
    assert torch.equal(alone, together[:20])
    assert torch.equal(moved, together[shuffled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.cos])
def test_elementwise_does_not_depend_on_the_row_s_position(threads: int, dtype: torch.dtype, function) -> None:
    row = torch.randn(16, 1000, dtype=dtype)
    alone = elementwise(function, row)
    for before in (16, 48, 80):
        packed = torch.randn(before + 16 + 32, 1000, dtype=dtype)
        packed[before : before + 16] = row
        assert packed.numel() > GRAIN
        assert torch.equal(elementwise(function, packed)[before : before + 16], alone)


def test_tiles_are_whole() -> None:
    assert (padded(1, 128), padded(128, 128), padded(129, 128), padded(5, None)) == (128, 128, 256, 5)
    with pytest.raises(AssertionError, match="not a multiple"):
        Linear(4, 4)(torch.zeros(130, 4), 128)


def test_tile_heights_that_change_a_row_are_not_used(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.forward

    def differs_in_tiles_of_four(self: Linear, x: torch.Tensor, tile_height: int | None = None) -> torch.Tensor:
        out = real(self, x, tile_height)
        return torch.nextafter(out, torch.zeros(())) if len(x) == 4 else out

    assert small_engine(model).planner.runner.decoder.padded_batch_size(17) == 32
    monkeypatch.setattr(Linear, "forward", differs_in_tiles_of_four)
    decoder = small_engine(model).planner.runner.decoder
    assert 4 not in {decoder.padded_batch_size(count) for count in range(1, 40)}
    assert decoder.padded_batch_size(1) in (8, 16)
