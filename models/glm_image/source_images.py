"""Source images of an edit, before and after encoding."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from models.errors import SourceImageError
from models.glm_image.config import CODE_CELL, MAX_ASPECT, MAX_SIDE, PATCH_CELL

MIN_SOURCE_SIDE = 16


@dataclass(frozen=True)
class PreprocessedImage:
    """A source image on the CPU."""

    rows: int  # of codes
    cols: int
    halved: Tensor  # [rows * cols, 3 * 16 * 16] float32 at half size, for the tokenizer
    pixels: Tensor  # [3, 32 * rows, 32 * cols] uint8, for the autoencoder

    @property
    def tokens(self) -> int:
        """Return its number of prompt tokens."""
        return self.rows * self.cols

    @property
    def patches(self) -> int:
        """Return its number of renderer tokens."""
        return self.tokens * (CODE_CELL // PATCH_CELL) ** 2


@dataclass(frozen=True)
class EncodedImage:
    codes: Tensor  # [rows, cols]
    latents: Tensor  # [channels, 4 * rows, 4 * cols], normalised

    @property
    def tokens(self) -> int:
        return self.codes.numel()

    @property
    def patches(self) -> int:
        return self.tokens * (CODE_CELL // PATCH_CELL) ** 2


class ImagePreprocessor:
    """Reads source images. Thread-safe."""

    def __init__(self, processor: BaseImageProcessor):
        self._processor = processor

    @property
    def settings(self) -> str:
        """Return the settings as JSON."""
        return self._processor.to_json_string()

    def read(self, file: bytes) -> PreprocessedImage:
        """Read a PNG file, scaled to the processor's grid: four patches a code, as in `GlmImagePipeline`.

        Raises:
            SourceImageError: not a PNG file, too small or too elongated.
        """
        image = _fit(_decode(file))
        inputs = self._processor(images=[image], return_tensors="pt")
        _, rows, cols = inputs["image_grid_thw"][0].tolist()
        assert max(rows, cols) * CODE_CELL <= MAX_SIDE, "the processor enlarges images beyond the largest side"
        scaled = image.resize((cols * CODE_CELL, rows * CODE_CELL), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()
        return PreprocessedImage(rows, cols, inputs["pixel_values"], pixels)


def _decode(file: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceImageError("a source image cannot be decoded; a PNG file is expected") from error


def _fit(image: Image.Image) -> Image.Image:
    """Shrink to the largest side and aspect; tolerate a rounded pixel."""
    short, long = sorted(image.size)
    if short < MIN_SOURCE_SIDE or long > MAX_ASPECT * (short + 1):
        raise SourceImageError(
            f"a source image is {image.width}x{image.height}; both sides must have at least {MIN_SOURCE_SIDE} pixels, "
            f"and one at most {MAX_ASPECT} times those of the other"
        )
    # Resizing to the grid cuts off less than a patch.
    scale = 1.0 if long < MAX_SIDE + PATCH_CELL else MAX_SIDE / long
    width, height = (round(side * scale) for side in image.size)
    longest = MAX_ASPECT * min(width, height)
    size = min(width, longest), min(height, longest)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
