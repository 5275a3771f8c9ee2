"""Decoding uploaded files into source images: upright RGB as PNG. Runs in `decode_worker`.

A file's type is that of its first bytes. Headers are checked before any pixel is decoded.
"""

import io
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image as PillowImage
from PIL import ImageOps
from PIL.Image import Exif, Image, Resampling, Transpose

from engine.geometry import CELL, MAX_ASPECT, MAX_SIDE, MIN_SIDE, edit_size, source_tokens
from engine.jobs.job import SourceImages
from server.image_files import jpeg_file, png_file
from server.image_files.colours import to_srgb
from server.image_files.edit_input import EditInput, InvalidImage
from server.image_files.file_types import read_file
from server.image_files.image_file import ImageFile, NotAnImage, UnsuitableFile, damaged
from server.image_files.sixteen_bits import decode_sixteen_bits

FULL_PIXELS = 4096 * 4096  # larger images are halved while they are decoded
MAX_PIXELS = {"PNG": 8192 * 8192, "JPEG": 8192 * 8192, "WEBP": 8192 * 4096}  # each takes up to 0.85 GB at its limit
MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
MAX_SCANNED_PIXELS = 2**30  # pixels times scans; a scan of 16 bytes can take 30 ms at `FULL_PIXELS`

_ACCEPTED = {"image": "send a PNG, JPEG or WEBP file", "mask": "send a PNG file with an alpha channel"}
_EXIF_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_TRANSPOSITIONS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SWAPPING = [_TRANSPOSITIONS[orientation] for orientation in (5, 6, 7, 8)]  # width and height


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
    if mask_file is not None:
        _check_mask(mask_file, files[0])
    alpha = None if mask_file is None else _alpha(mask_file.decode()[0])
    sources, tokens, overlay = [], 0, None
    for file in files:  # singly: a decoded image may take 270 MB
        image = _rgb(*file.decode(), max_pixels)
        tokens += source_tokens(*image.size)
        if not sources:
            size = size or _edit_size(image.size, max_pixels)
            overlay = None if alpha is None else _png(_overlay(image, alpha, size))
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

    @cached_property
    def parts(self) -> ImageFile:
        try:
            return read_file(self.data)
        except NotAnImage as error:
            raise self.error(f"{error}; {_ACCEPTED[self.param]}") from None
        except UnsuitableFile as error:
            raise self.error(str(error)) from None

    @cached_property
    def transposition(self) -> Transpose | None:
        return _TRANSPOSITIONS.get(_orientation(self.parts))

    @property
    def upright_size(self) -> tuple[int, int]:
        width, height = self.parts.size
        return (height, width) if self.transposition in _SWAPPING else (width, height)

    def check(self) -> ImageFile:
        """Check structure and header; decode nothing."""
        self.report(self.param, self.name)
        try:
            _check_sides(self.parts)
            _check_scans(self.parts)
        except UnsuitableFile as error:
            raise self.error(str(error)) from None
        return self.parts

    def decode(self) -> tuple[Image, bytes | None]:
        """Decode a checked image, at half its size if it is large, upright; return it and its profile."""
        self.report(self.param, self.name)
        try:
            image, profile = _decode(self.parts if self.param == "image" else replace(self.parts, profile=None))
        except UnsuitableFile as error:
            raise self.error(str(error)) from None
        return image if self.transposition is None else image.transpose(self.transposition), profile


def _decode(file: ImageFile) -> tuple[Image, bytes | None]:
    """Return the image and the profile that it has now."""
    profile = file.profile
    is_large = math.prod(file.size) > FULL_PIXELS
    is_deep = bool(file.transparent or (file.depth == 16 and profile and not is_large))
    try:
        if is_deep:
            image, profile = decode_sixteen_bits(file)
        else:
            image = _load(file, is_large)
    except MemoryError:
        raise
    except Exception:  # damaged files make Pillow raise any exception
        raise _explain(file) from None
    if file.file_format == "PNG" and (is_deep or _may_be_short(image)):
        png_file.check_pixels(file.data)
    image = _eight_bits(image)
    if math.prod(image.size) > FULL_PIXELS:
        image = _colour(image, ("CMYK",)).reduce(2)
    return image, profile


def _load(file: ImageFile, halve: bool) -> Image:
    image = PillowImage.open(io.BytesIO(file.data), formats=(file.file_format,))
    if halve:
        image.draft(image.mode, (image.width // 2, image.height // 2))  # of a JPEG
    image.load()
    return image


def _explain(file: ImageFile) -> UnsuitableFile:
    """Say why Pillow cannot decode a file."""
    if file.file_format == "JPEG":
        return jpeg_file.explain(file.data)
    try:
        if file.file_format == "PNG":
            png_file.check_pixels(file.data)
    except UnsuitableFile as error:
        return error
    return damaged(file.file_format, "its pixels cannot be decoded")


def _may_be_short(image: Image) -> bool:
    """Tell whether rows may be missing at the end: Pillow leaves them zero without an error."""
    width, height = image.size
    rows = (image.crop((0, y, width, y + 1)).tobytes() for y in (height - 2, height - 1))
    return not all(row.strip(b"\0") for row in rows)


def _check_mask(mask: _File, first: _File) -> None:
    parts = mask.check()
    accepted = "it must be a PNG with an alpha channel; the edit changes only where alpha is 0"
    if parts.file_format != "PNG":
        raise mask.error(f"is a {parts.file_format} file; {accepted}")
    if not parts.has_alpha:
        raise mask.error(f"has no alpha channel; {accepted}")
    if mask.upright_size != first.upright_size:
        sizes = f"has {_format_size(mask.upright_size)} pixels and the first image {_format_size(first.upright_size)}"
        raise mask.error(f"{sizes}; make them equal")


def _check_sides(file: ImageFile) -> None:
    short, long = sorted(file.size)
    maximum = MAX_PIXELS[file.file_format]
    if short * long > maximum:
        accepted = f"{maximum} ({maximum // 10**6} megapixels) are accepted in a {file.file_format} file"
        raise UnsuitableFile(f"has {_format_size(file.size)} pixels; at most {accepted}")
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        required = f"sides of at least {MIN_SIDE}, one at most {MAX_ASPECT} times the other"
        raise UnsuitableFile(f"has {_format_size(file.size)} pixels; it needs {required}")


def _check_scans(file: ImageFile) -> None:
    if file.scans > MAX_SCANS:
        raise UnsuitableFile(f"is a JPEG with more than {MAX_SCANS} scans; save it again with fewer")
    if file.scans * math.prod(file.size) > MAX_SCANNED_PIXELS:
        found = f"{file.scans} scans, too many for {_format_size(file.size)} pixels"
        raise UnsuitableFile(f"is a JPEG of {found}; save it with fewer")


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _orientation(file: ImageFile) -> int:
    exif = Exif()
    with suppress(Exception):  # invalid metadata makes Pillow raise any exception
        exif.load(file.exif)
        if isinstance(value := exif.get(_EXIF_ORIENTATION), int):
            return value
    found = _XMP_ORIENTATION.search(file.xmp)
    return 1 if found is None else int(found[1])


def _eight_bits(image: Image) -> Image:
    """Convert 16-bit grey, which Pillow would clip."""
    return image.point(lambda value: value * (1 / 256) + 0).convert("L") if image.mode.startswith("I") else image


def _colour(image: Image, keep: tuple[str, ...]) -> Image:
    """Convert to RGB, or RGBA if parts are transparent, except from modes to `keep`."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode in (mode, *keep) else image.convert(mode)  # `convert` would copy it


def _alpha(mask: Image) -> Image:
    return (mask if mask.mode in ("LA", "RGBA") else mask.convert("RGBA")).getchannel("A")


def _rgb(image: Image, profile: bytes | None, max_pixels: int) -> Image:
    """Convert to 8-bit sRGB on white, no larger than `max_pixels`."""
    image = _colour(image, () if profile is None else ("CMYK",))
    scale = _scale(image.size, max_pixels)
    if scale < 1:
        width, height = (math.floor(side * scale) for side in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
    if profile is not None:
        image = to_srgb(image, profile)
    if image.mode == "RGBA":
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
