"""The pictures an edit starts from: as the networks take them, and as the networks see them."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from models.errors import SourceImageError

CODE_CELL = 32  # pixels a side of one code
PATCH_CELL = 16  # pixels a side of one renderer token
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 16, 2048, 4


@dataclass(frozen=True)
class PreprocessedImage:
    """A picture on the CPU, laid out for the networks.

    Args:
        rows, cols: the grid of its codes, one for 32 x 32 pixels.
        halved: [rows * cols, 3 * 16 * 16] float32 patches of the picture at half its size, for the vision tokenizer.
        pixels: [3, 32 * rows, 32 * cols] uint8, for the autoencoder.
    """

    rows: int
    cols: int
    halved: Tensor
    pixels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the prompt that stand for it."""
        return self.rows * self.cols

    @property
    def patches(self) -> int:
        """Renderer tokens of it."""
        return self.tokens * (CODE_CELL // PATCH_CELL) ** 2


@dataclass(frozen=True)
class EncodedImage:
    """What the planner and the renderer learn of a picture.

    Args:
        codes: [rows, cols] codebook indices.
        latents: [channels, 4 * rows, 4 * cols] normalised.
    """

    codes: Tensor
    latents: Tensor

    @property
    def tokens(self) -> int:
        return self.codes.numel()

    @property
    def patches(self) -> int:
        return self.tokens * (CODE_CELL // PATCH_CELL) ** 2


class ImagePreprocessor:
    """Files to pictures. Several threads may read at once."""

    def __init__(self, processor: BaseImageProcessor):
        self._processor = processor

    @property
    def settings(self) -> str:
        """What the processor was told, as JSON."""
        return self._processor.to_json_string()

    def read(self, file: bytes) -> PreprocessedImage:
        """The picture in a PNG file.

        The processor of the checkpoint decides on the grid: about the picture's own size, within the limits it was
        made for. The autoencoder gets the picture at exactly that size, so that there are four renderer tokens to a
        code (`GlmImagePipeline` takes other pictures for an error).

        Raises:
            SourceImageError: it cannot be decoded, is too small, or too long for its width.
        """
        image = _fitting(_decode(file))
        inputs = self._processor(images=[image], return_tensors="pt")
        _, rows, cols = inputs["image_grid_thw"][0].tolist()
        assert max(rows, cols) * CODE_CELL <= MAX_SIDE, "the processor enlarges pictures beyond what can be made"
        scaled = image.resize((cols * CODE_CELL, rows * CODE_CELL), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()
        return PreprocessedImage(rows, cols, inputs["pixel_values"], pixels)


def _decode(file: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceImageError("a picture to edit cannot be decoded; a PNG file is expected") from error


def _fitting(image: Image.Image) -> Image.Image:
    """The picture, or a smaller one if it is larger than any image can be.

    Its aspect may be off by a pixel: whoever made a picture smaller before may have rounded.
    """
    short, long = sorted(image.size)
    if short < MIN_SIDE or long > MAX_ASPECT * (short + 1):
        raise SourceImageError(
            f"a picture to edit is {image.width}x{image.height}; both sides must have at least {MIN_SIDE} pixels, and "
            f"one at most {MAX_ASPECT} times those of the other"
        )
    # A remainder of less than a patch is cut off by the resizing to the grid.
    scale = 1.0 if long < MAX_SIDE + PATCH_CELL else MAX_SIDE / long
    width, height = (round(side * scale) for side in image.size)
    longest = MAX_ASPECT * min(width, height)
    size = min(width, longest), min(height, longest)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
