"""Decoding uploaded files into source images: upright RGB as PNG. Runs in `decode_worker`.

A file's type is that of its first bytes. Headers are checked before any pixel is decoded.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageOps, PngImagePlugin
from PIL.Image import Image, Resampling, Transpose

from engine.geometry import CELL, MAX_ASPECT, MAX_SIDE, MIN_SIDE, edit_size, source_tokens
from engine.jobs.job import SourceImages
from server.requests.edit_input import EditInput, InvalidImage
from server.requests.image_files import UnsuitableFile, check_structure, count_scans, format_of, too_many_pixels

MAX_PIXELS = 4096 * 4096
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS  # pixels times scans; a scan of 16 bytes can take 30 ms at `MAX_PIXELS`

PngImagePlugin.MAX_TEXT_MEMORY = 8 * 2**20  # of text chunks, unpacked; Pillow's default is 64 MiB

_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def prepare(
    images: list[bytes],
    mask: bytes | None,
    size: tuple[int, int] | None,
    max_pixels: int,
    report: Callable[[str, str], None] = lambda param, name: None,
) -> EditInput:
    """Decode files, for up to seconds.

    Args:
        size, max_pixels: as in `EditFiles`.
        report: called with field and name of each file before work on it.

    Raises:
        InvalidImage: names the image and the reason.
    """
    count = len(images)
    names = [f"Image {number} of {count}" if count > 1 else "The image" for number in range(1, count + 1)]
    files = [_File(data, "image", name, report) for data, name in zip(images, names, strict=True)]
    mask_file = None if mask is None else _File(mask, "mask", "The mask", report)
    for file in files:
        file.check()
    if mask_file is not None and not _has_alpha(mask_file.check()):
        raise mask_file.error("must be a PNG with an alpha channel; the edit changes only where alpha is 0")
    alpha = None if mask_file is None else mask_file.decode().convert("RGBA").getchannel("A")
    sources, tokens, overlay = [], 0, None
    for file in files:  # singly: a decoded image may take 64 MB
        upright = file.decode()
        image = _rgb(upright, max_pixels)
        tokens += source_tokens(*image.size)
        if not sources:
            size = size or _edit_size(image.size, max_pixels)
            if mask_file is not None and alpha is not None:
                if alpha.size != upright.size:
                    sizes = f"has {_format_size(alpha.size)} pixels and the first image {_format_size(upright.size)}"
                    raise mask_file.error(f"{sizes}; make them equal")
                overlay = _png(_overlay(image, alpha, size))
        sources.append(_png(image))
    assert size is not None
    return EditInput(size, tokens, SourceImages(sources, overlay))


@dataclass(frozen=True)
class _File:
    """A file in the field `param`; messages call it `name`."""

    data: bytes
    param: str
    name: str
    report: Callable[[str, str], None]

    def error(self, reason: str) -> InvalidImage:
        return InvalidImage(self.param, f"{self.name} {reason}.")

    def check(self) -> Image:
        """Check structure and header; decode nothing."""
        self.report(self.param, self.name)
        try:
            file_format = format_of(self.data)
            check_structure(self.data, file_format, MAX_PIXELS)
            image = self._open()
            _check_sides(image.size)
            if file_format == "JPEG":
                _check_scans(count_scans(self.data), *image.size)
        except UnsuitableFile as error:
            raise self.error(str(error)) from None
        return image

    def _open(self) -> Image:
        file_format = format_of(self.data)
        try:
            image = PillowImage.open(io.BytesIO(self.data), formats=(file_format,))
            # "MPO" photos contain a second image, but are not animations.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning):
            raise self.error(f"has too many pixels; at most {MAX_PIXELS} are accepted") from None
        except MemoryError:
            raise
        except Exception:  # damaged files make Pillow raise any exception
            raise self.error(f"cannot be read: the {file_format} file is damaged or incomplete") from None
        if frames > 1:
            raise self.error("is animated; send a single image")
        return image

    def decode(self) -> Image:
        """Decode a checked image and turn it upright."""
        self.report(self.param, self.name)
        image = self._open()
        try:
            image.load()
        except MemoryError:
            raise
        except Exception:  # as above
            raise self.error("cannot be read: the file is damaged or incomplete") from None
        transposition = _TRANSPOSITIONS.get(_orientation(image))
        return image if transposition is None else image.transpose(transposition)


def _check_sides(size: tuple[int, int]) -> None:
    short, long = sorted(size)
    if short * long > MAX_PIXELS:
        raise too_many_pixels(*size, MAX_PIXELS)
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        required = f"sides of at least {MIN_SIDE}, one at most {MAX_ASPECT} times the other"
        raise UnsuitableFile(f"has {_format_size(size)} pixels; it needs {required}")


def _check_scans(scans: int, width: int, height: int) -> None:
    if scans > MAX_SCANS:
        raise UnsuitableFile(f"is a JPEG with more than {MAX_SCANS} scans; save it again with fewer")
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise UnsuitableFile(f"is a JPEG of {scans} scans, too many for {width}x{height} pixels; save it with fewer")


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _has_alpha(mask: Image) -> bool:
    return mask.format == "PNG" and mask.has_transparency_data


def _orientation(image: Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # as above; the pixels may be intact
        return 1


def _rgb(image: Image, max_pixels: int) -> Image:
    """Convert to 8-bit RGB on white, no larger than `max_pixels`."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        image = image.point(lambda value: value * (1 / 256) + 0).convert("L")
        image.info.pop("transparency", None)
    transparent = image.has_transparency_data
    mode = "RGBA" if transparent else "RGB"
    if image.mode != mode:  # `convert` would copy it
        image = image.convert(mode)
    scale = _scale(image.size, max_pixels)
    if scale < 1:
        width, height = (math.floor(side * scale) for side in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
    if transparent:
        image = PillowImage.alpha_composite(PillowImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _scale(size: tuple[int, int], max_pixels: int) -> float:
    return min(1.0, MAX_SIDE / max(size), math.sqrt(max_pixels / (size[0] * size[1])))


def _edit_size(first: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    width, height = edit_size(*first)
    while width * height > max_pixels and max(width, height) > MIN_SIDE:  # rounding may exceed it
        width, height = (width - CELL, height) if width >= height else (width, height - CELL)
    return width, height


def _overlay(first: Image, alpha: Image, size: tuple[int, int]) -> Image:
    """Return what the mask keeps of the first image, to be pasted over the result."""
    overlay = ImageOps.fit(first, size, Resampling.LANCZOS)
    overlay.putalpha(ImageOps.fit(alpha, size, Resampling.BILINEAR))
    return overlay


def _png(image: Image) -> bytes:
    """Encode without metadata, fast rather than small: it is kept no longer than the job."""
    image.info = {}
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
