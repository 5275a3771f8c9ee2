"""Pixels to files. Runs on threads beside the engine's: an encoder holds no lock while it works."""

import io
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from engine.jobs.job import JobSpec, OutputFormat

PNG_EFFORT = 4  # of 9: twice as fast as the default of 6 for files 2% larger


def resized(pixels: Tensor, width: int, height: int) -> Tensor:
    """Pixels [h, w, 3], uint8, as [height, width, 3]."""
    if tuple(pixels.shape[:2]) == (height, width):
        return pixels
    image = PillowImage.fromarray(pixels.numpy()).resize((width, height), PillowImage.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def covered(pixels: Tensor, overlay: bytes) -> Tensor:
    """Pixels [height, width, 3], uint8, under an RGBA PNG of that size: where it is opaque, its own to the bit."""
    image = PillowImage.fromarray(pixels.numpy())
    with PillowImage.open(io.BytesIO(overlay), formats=["PNG"]) as cover:
        assert cover.size == image.size, f"an overlay of {cover.size} for a picture of {image.size}"
        image.paste(cover, mask=cover.getchannel("A"))
    return torch.from_numpy(np.array(image))


def metadata(spec: JobSpec, seed: int) -> dict[str, str]:
    """What is worth knowing of a picture of this job, for `encode`. The prompt is the user's to give away."""
    texts = {"seed": str(seed), "size": f"{spec.width}x{spec.height}", "model": spec.model}
    if spec.embed_prompt:
        texts["prompt"] = spec.prompt
    return {name: text for name, text in texts.items() if text}


def encode(pixels: Tensor, output_format: OutputFormat, quality: int, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG, JPEG or WEBP file of pixels [height, width, 3], uint8. The same pixels and texts give the same bytes.

    Args:
        quality: 0..100, for JPEG and WEBP.
        texts: metadata, for PNG.
    """
    image, file = PillowImage.fromarray(pixels.numpy()), io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", compress_level=PNG_EFFORT, pnginfo=_png_info(texts or {}))
    elif output_format == "jpeg":
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def _png_info(texts: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)  # as iTXt, UTF-8, where Latin-1 does not do
    return info
