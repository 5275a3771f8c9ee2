"""Source images: which are accepted, their grid, and the server's bound of their tokens."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm_image.image_processing_pil_glm_image import smart_resize

from engine import geometry
from engine.geometry import CELL, MAX_ASPECT, MAX_SIDE, MIN_SIDE, edit_size, source_tokens
from models.errors import SourceImageError
from models.glm_image import config
from models.glm_image.model import GlmImage
from tests.source_images import png, source_image


@pytest.mark.parametrize(
    ("width", "height", "cols", "rows"),
    [
        (160, 128, 5, 4),
        (64, 256, 2, 8),
        (163, 143, 5, 4),  # resized to the grid
        (150, 150, 5, 5),
        (32, 40, 2, 2),  # enlarged to the checkpoint's minimum
        (16, 64, 2, 8),
        (2048, 512, 64, 16),
        (4096, 3000, 64, 47),  # shrunk
        (1413, 353, 44, 11),  # 4 to 1, off by rounding
    ],
)
def test_an_image_is_fitted_to_its_grid(model: GlmImage, width: int, height: int, cols: int, rows: int) -> None:
    read = model.preprocessor.read(png(source_image(0, width, height)))
    assert (read.rows, read.cols) == (rows, cols)
    assert read.halved.shape == (rows * cols, 3 * 16 * 16)
    assert read.pixels.shape == (3, 32 * rows, 32 * cols)
    assert read.pixels.dtype == torch.uint8
    assert (read.tokens, read.patches) == (rows * cols, 4 * rows * cols)


def test_an_image_on_the_grid_is_not_resampled(model: GlmImage) -> None:
    image = source_image(0, 96, 64)
    read = model.preprocessor.read(png(image))
    assert bytes(read.pixels.permute(1, 2, 0).contiguous().numpy()) == image.tobytes()


@pytest.mark.parametrize(
    ("size", "message"), [((15, 40), "15x40; both sides must have at least 16 pixels"), ((404, 99), "at most 4 times")]
)
def test_images_of_other_shapes_are_refused(model: GlmImage, size: tuple[int, int], message: str) -> None:
    with pytest.raises(SourceImageError, match=message):
        model.preprocessor.read(png(source_image(0, *size)))


def test_a_file_that_is_not_a_png_is_refused(model: GlmImage) -> None:
    whole = png(source_image(0, 64, 64))
    jpeg = io.BytesIO()
    source_image(0, 64, 64).save(jpeg, "JPEG")
    for file in (b"", b"text", whole[:200], whole[:-50], jpeg.getvalue()):
        with pytest.raises(SourceImageError, match="a PNG file is expected"):
            model.preprocessor.read(file)


def test_images_of_other_modes_are_read_in_colour(model: GlmImage) -> None:
    for mode in ("L", "P", "RGBA"):
        image = source_image(0, 64, 64).convert(mode)
        assert bytes(model.preprocessor.read(png(image)).pixels.permute(1, 2, 0).contiguous().numpy()) == (
            image.convert("RGB").tobytes()
        )


def test_an_encoded_image_depends_only_on_its_file(model: GlmImage) -> None:
    """Compare bits, with other images encoded in between."""
    files = [png(source_image(seed, 64 + 32 * seed, 96)) for seed in range(3)]
    alone = [model.encode_source(model.preprocessor.read(file)) for file in files]
    for file, before in reversed(list(zip(files, alone, strict=True))):
        again = model.encode_source(model.preprocessor.read(file))
        assert torch.equal(again.codes, before.codes)
        assert torch.equal(again.latents, before.latents)


sides = st.integers(16, 8192)
sizes = st.tuples(sides, sides).filter(lambda size: max(size) <= 4 * min(size))


@given(sizes)
@settings(max_examples=500, deadline=None)
def test_the_server_s_bound_of_tokens_holds_for_any_checkpoint(size: tuple[int, int]) -> None:
    """Compare with the published processor, with the minimum size of the small and of the published checkpoint."""
    width, height = size
    for least in (64, 512):
        rows, cols = (side // 16 for side in smart_resize(height, width, 16, least**2, 2048**2))
        assert rows * cols <= source_tokens(width, height) <= 4096
    assert source_tokens(512, 512) == 256
    assert source_tokens(2048, 1024) == 2048


def test_models_and_api_have_the_same_bounds() -> None:
    for name in ("MIN_SIDE", "MAX_SIDE", "MAX_ASPECT", "MAX_STEPS"):
        assert getattr(config, name) == getattr(geometry, name)
    assert (config.CODE_CELL, config.PATCH_CELL) == (geometry.CELL, geometry.PATCH)


@given(sizes)
@settings(max_examples=500, deadline=None)
def test_the_size_of_an_edit_is_valid(size: tuple[int, int]) -> None:
    edited = edit_size(*size)
    assert all(side % CELL == 0 and MIN_SIDE <= side <= MAX_SIDE for side in edited)
    assert max(edited) <= MAX_ASPECT * min(edited)
    assert edit_size(*edited) == edited
    if all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        near = all(abs(side - given) <= CELL for side, given in zip(edited, size, strict=True))
        assert near or max(edited) == MAX_ASPECT * min(edited)  # the shorter side, rounded down, allows no more


def test_sizes_of_edits() -> None:
    assert edit_size(160, 128) == (160, 128)
    assert edit_size(1000, 750) == (992, 736)
    assert edit_size(4000, 3000) == (2048, 1536)
    assert edit_size(20, 30) == (64, 96)
