"""What `png_file`, `jpeg_file` and `webp_file` read from a file without decoding it. No Pillow."""

from dataclasses import dataclass

MAX_PARTS = 100_000  # chunks or segments of a file, each about 1 us to skip


class UnsuitableFile(Exception):
    """The file is refused; the message completes "The image ..."."""


class NotAnImage(UnsuitableFile):
    """The file is of another type; the message is to be followed by what is accepted."""


@dataclass(frozen=True)
class ImageFile:
    """A file reduced to what changes its pixels.

    Args:
        data: the file without metadata, for its decoder.
        size: (width, height) as stored.
        colours: the signature that a fitting ICC profile has: "GRAY", "RGB " or "CMYK".
        transparent: the 16-bit colour that is, if one is.
        profile: the ICC profile to convert from; None for sRGB.
        scans: of a JPEG, each a pass over the whole image.
    """

    file_format: str
    data: bytes
    size: tuple[int, int]
    colours: str = "RGB "
    depth: int = 8
    has_alpha: bool = False
    transparent: tuple[int, ...] = ()
    profile: bytes | None = None
    exif: bytes = b""
    xmp: bytes = b""
    scans: int = 1


def truncated(file_format: str, place: str) -> UnsuitableFile:
    return UnsuitableFile(f"cannot be read: the {file_format} file is truncated, it ends {place}; send the whole file")


def damaged(file_format: str, what: str) -> UnsuitableFile:
    return UnsuitableFile(f"cannot be read: the {file_format} file is damaged, {what}")


def too_many_parts(file_format: str, parts: str) -> UnsuitableFile:
    return UnsuitableFile(f"is a {file_format} file of more than {MAX_PARTS} {parts}; save it again")


def animated(file_format: str) -> UnsuitableFile:
    return UnsuitableFile(f"is an animated {file_format} file; send a single image")
