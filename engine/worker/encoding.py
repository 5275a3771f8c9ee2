"""Encode pixels [height, width, 3] uint8 as files."""

import io
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from engine.jobs.job import JobSpec, OutputFormat
from engine.jobs.results import ImageResult, PartialImage
from engine.request import Image, Partial, Request

PNG_COMPRESS_LEVEL = 4  # of 9; twice as fast as the default 6, files 2% larger


def encode_result(image: Image, pixels: Tensor) -> ImageResult:
    """Encode an image; add its plan if requested."""
    spec = image.request.spec
    pixels = _with_overlay(pixels, image.request)
    data = encode(pixels, spec.output_format, spec.output_compression, metadata(spec, image.seed))
    return ImageResult(data, image.seed, image.plan.to_dict() if spec.return_plan and image.plan else None)


def encode_partial(partial: Partial) -> PartialImage:
    """Encode a partial image at the final size."""
    spec = partial.request.spec
    pixels = _with_overlay(resize(partial.pixels, spec.width, spec.height), partial.request)
    data = encode(pixels, spec.output_format, spec.output_compression)
    return PartialImage(partial.image.index, partial.index, data, partial.grid.to_dict())


def resize(pixels: Tensor, width: int, height: int) -> Tensor:
    """Resample pixels to [height, width, 3]."""
    if tuple(pixels.shape[:2]) == (height, width):
        return pixels
    image = PillowImage.fromarray(pixels.numpy()).resize((width, height), PillowImage.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def apply_overlay(pixels: Tensor, overlay: bytes) -> Tensor:
    """Paste an RGBA PNG of the same size; opaque pixels stay exact."""
    image = PillowImage.fromarray(pixels.numpy())
    with PillowImage.open(io.BytesIO(overlay), formats=["PNG"]) as cover:
        assert cover.size == image.size, f"an overlay of {cover.size} for an image of {image.size}"
        image.paste(cover, mask=cover.getchannel("A"))
    return torch.from_numpy(np.array(image))


def metadata(spec: JobSpec, seed: int) -> dict[str, str]:
    """Return the texts to embed; the prompt only if requested."""
    texts = {"seed": str(seed), "size": f"{spec.width}x{spec.height}", "model": spec.model}
    if spec.embed_prompt:
        texts["prompt"] = spec.prompt
    return {name: text for name, text in texts.items() if text}


def encode(pixels: Tensor, output_format: OutputFormat, quality: int, texts: Mapping[str, str] | None = None) -> bytes:
    """Encode pixels; equal inputs give equal bytes.

    Args:
        quality: 0..100, of JPEG and WEBP.
        texts: PNG's metadata.
    """
    image, file = PillowImage.fromarray(pixels.numpy()), io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=_png_info(texts or {}))
    elif output_format == "jpeg":
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def _with_overlay(pixels: Tensor, request: Request) -> Tensor:
    overlay = request.source_images.overlay if request.source_images else None
    return pixels if overlay is None else apply_overlay(pixels, overlay)


def _png_info(texts: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)  # iTXt in UTF-8 unless Latin-1 suffices
    return info
