"""From the files of an upload to what an engine edits: upright RGB pictures as PNG.

A file says little about itself that can be trusted: its first bytes decide what it is, and its header what it may cost
before a pixel of it is decoded.
"""

import io
import math
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageOps, PngImagePlugin
from PIL.Image import Image, Resampling, Transpose

from engine.geometry import CELL, MAX_ASPECT, MAX_SIDE, MIN_SIDE, edit_size, source_tokens
from engine.jobs.job import SourceImages
from server.errors import ApiError, invalid_image

MAX_PIXELS = 4096 * 4096
MAX_SCANS = 100  # of a progressive JPEG: each takes a pass over all of the picture, and encoders write about ten

PngImagePlugin.MAX_TEXT_MEMORY = 8 * 2**20  # of a file's texts, unpacked; Pillow would go up to 64 MiB

_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class EditInput:
    """
    Args:
        size: width and height of the edit.
        tokens: an upper bound of the prompt tokens that stand for the pictures.
    """

    size: tuple[int, int]
    tokens: int
    source_images: SourceImages


def prepare(images: list[bytes], mask: bytes | None, size: tuple[int, int] | None, max_pixels: int) -> EditInput:
    """Decodes what was uploaded. Takes up to seconds; meant for a thread.

    Args:
        size: of the edit; None for that of the first picture, on the 32-pixel grid.
        max_pixels: what this server makes at most; larger pictures are made smaller.

    Raises:
        ApiError: 400 naming the picture that cannot be used, and why.
    """
    count = len(images)
    named = [f"Image {number} of {count}" if count > 1 else "The image" for number in range(1, count + 1)]
    files = [_File(data, "image", name) for data, name in zip(images, named, strict=True)]
    mask_file = None if mask is None else _File(mask, "mask", "The mask")
    for file in files:
        file.open()
    if mask_file is not None and not _has_alpha(mask_file.open()):
        raise mask_file.refused("must be a PNG with an alpha channel; where that is 0 the picture may change")
    alpha = None if mask_file is None else mask_file.decode().convert("RGBA").getchannel("A")
    sources, tokens, overlay = [], 0, None
    for file in files:  # one after the other: a decoded picture may take 64 MB
        upright = file.decode()
        picture = _rgb(upright, max_pixels)
        tokens += source_tokens(*picture.size)
        if not sources:
            size = size or _size_of_edit(picture.size, max_pixels)
            if mask_file is not None and alpha is not None:
                if alpha.size != upright.size:
                    sizes = f"has {_in_words(alpha.size)} pixels and the first image {_in_words(upright.size)}"
                    raise mask_file.refused(f"{sizes}; make them equal")
                overlay = _png(_overlay(picture, alpha, size))
        sources.append(_png(picture))
    assert size is not None
    return EditInput(size, tokens, SourceImages(sources, overlay))


@dataclass(frozen=True)
class _File:
    """A file that was sent as field `param`, and what to call it."""

    data: bytes
    param: str
    name: str

    def refused(self, reason: str) -> ApiError:
        return invalid_image(self.param, f"{self.name} {reason}.")

    def open(self) -> Image:
        """The picture, its header read and found fit, nothing decoded.

        Raises:
            ApiError: 400 where it is not.
        """
        kind = self._kind()
        try:
            picture = PillowImage.open(io.BytesIO(self.data), formats=(kind,))
            # Photos with a second picture inside, "MPO", are no animations.
            frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning):
            raise self.refused(f"has too many pixels; at most {MAX_PIXELS} are accepted") from None
        except Exception:  # Pillow raises whatever a broken file leads it to
            raise self.refused(f"cannot be read: the {kind} file is damaged or cut short") from None
        short, long = sorted(picture.size)
        if short * long > MAX_PIXELS:
            raise self.refused(f"has {_in_words(picture.size)} pixels; at most {MAX_PIXELS} are accepted")
        if frames > 1:
            raise self.refused("is animated; send a single picture")
        if short < MIN_SIDE or long > MAX_ASPECT * short:
            needed = f"sides of at least {MIN_SIDE}, one at most {MAX_ASPECT} times the other"
            raise self.refused(f"has {_in_words(picture.size)} pixels; it needs {needed}")
        if kind == "JPEG" and self.data.count(b"\xff\xda") > MAX_SCANS:
            raise self.refused(f"is a JPEG of more than {MAX_SCANS} scans; save it anew")
        return picture

    def _kind(self) -> str:
        kind = next((kind for kind, magic in _MAGIC.items() if self.data.startswith(magic)), None)
        if kind is None or (kind == "WEBP" and self.data[8:12] != b"WEBP"):
            raise self.refused("is no PNG, JPEG or WEBP file")
        return kind

    def decode(self) -> Image:
        """The picture, upright.

        Raises:
            ApiError: 400 where it cannot be decoded.
        """
        picture = self.open()
        try:
            picture.load()
        except Exception:  # as above
            raise self.refused("cannot be read: the file is damaged or cut short") from None
        turn = _TURNS.get(_orientation(picture))
        return picture if turn is None else picture.transpose(turn)


def _in_words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _has_alpha(mask: Image) -> bool:
    return mask.format == "PNG" and mask.has_transparency_data


def _orientation(picture: Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above; the picture may be fine all the same
        return 1


def _rgb(picture: Image, max_pixels: int) -> Image:
    """Eight bits of red, green and blue, what is transparent white, and no larger than what the server makes."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        picture = picture.point(lambda value: value * (1 / 256) + 0).convert("L")
        picture.info.pop("transparency", None)
    transparent = picture.has_transparency_data
    mode = "RGBA" if transparent else "RGB"
    if picture.mode != mode:  # otherwise it would be copied
        picture = picture.convert(mode)
    scale = _scale(picture.size, max_pixels)
    if scale < 1:
        width, height = (math.floor(side * scale) for side in picture.size)
        picture = picture.resize((width, height), Resampling.LANCZOS)
    if transparent:
        picture = PillowImage.alpha_composite(PillowImage.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture


def _scale(size: tuple[int, int], max_pixels: int) -> float:
    return min(1.0, MAX_SIDE / max(size), math.sqrt(max_pixels / (size[0] * size[1])))


def _size_of_edit(first: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The first picture's size, on the grid and within what the server makes."""
    width, height = edit_size(*first)
    while width * height > max_pixels and max(width, height) > MIN_SIDE:  # rounding up may have gone too far
        width, height = (width - CELL, height) if width >= height else (width, height - CELL)
    return width, height


def _overlay(first: Image, alpha: Image, size: tuple[int, int]) -> Image:
    """What covers the finished picture: the first picture, cut and scaled to its size, where the mask keeps it."""
    overlay = ImageOps.fit(first, size, Resampling.LANCZOS)
    overlay.putalpha(ImageOps.fit(alpha, size, Resampling.BILINEAR))
    return overlay


def _png(picture: Image) -> bytes:
    """A file without any metadata, packed fast rather than small: it lives for as long as the job."""
    picture.info = {}
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
