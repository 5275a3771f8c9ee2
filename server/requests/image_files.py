"""Bounds on a file's cost from its structure alone, before decoding. No Pillow."""

import re
import struct

MAX_CHUNKS = 256  # of a PNG or WEBP, beside pixels; files have a few dozen
BYTES_PER_PIXEL_CHUNK = 1024  # on average; encoders write 8 or 64 KiB
MAX_SEGMENTS = 1024  # of a JPEG; the largest profiles and depth maps take 255
MAX_FILL_BYTES = 4096  # between segments of a JPEG

_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
# Within the coefficients of a scan, FF is followed by 00 or a restart marker.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE, _FIRST_WITH_LENGTH = 0xDA, 0xD9, 0xC0


class UnsuitableFile(Exception):
    """The file is refused; the message completes "The image ..."."""


def format_of(data: bytes) -> str:
    """Return PNG, JPEG or WEBP, by the first bytes."""
    found = next((name for name, magic in _MAGIC.items() if data.startswith(magic)), None)
    if found is None or (found == "WEBP" and data[8:12] != b"WEBP"):
        raise UnsuitableFile("is not a PNG, JPEG or WEBP file")
    return found


def check_structure(data: bytes, file_format: str, max_pixels: int) -> None:
    """Raise `UnsuitableFile` if the parts would take long to parse."""
    if file_format == "PNG":
        _check_png(data)
    elif file_format == "WEBP":
        _check_webp(data, max_pixels)
    else:
        count_scans(data)


def _check_png(data: bytes) -> None:
    position, pixel_chunks, other_chunks, has_profile = 8, 0, 0, False
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        if kind == b"acTL" and data[position + 8 : position + 12] > b"\0\0\0\1":
            raise _animated()
        pixel_chunks += kind == b"IDAT"
        other_chunks += kind != b"IDAT"
        if other_chunks > MAX_CHUNKS or pixel_chunks > MAX_CHUNKS + len(data) // BYTES_PER_PIXEL_CHUNK:
            raise UnsuitableFile("is a PNG of too many chunks; save it again")
        if kind == b"iCCP":
            if has_profile:  # each unpacks to 1 MB
                raise UnsuitableFile("is a PNG with more than one colour profile; save it again")
            has_profile = True
        position += 12 + length


def _check_webp(data: bytes, max_pixels: int) -> None:
    position, frames = 12, 0
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        frames += kind == b"ANMF"
        if frames > 1:
            raise _animated()
        if kind == b"VP8X" and position + 18 <= len(data):
            canvas = data[position + 12 : position + 18]
            width, height = (1 + int.from_bytes(side, "little") for side in (canvas[:3], canvas[3:]))
            if width * height > max_pixels:  # a canvas takes 8 bytes a pixel
                raise too_many_pixels(width, height, max_pixels)
        position += 8 + length + length % 2
    raise UnsuitableFile("is a WEBP of too many chunks; save it again")


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG, each a pass over the whole image."""
    position, scans, fill = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None or marker[1][0] == _END_OF_IMAGE:
            return scans
        if scans == 0:
            fill += marker.end() - 2 - position
            if fill > MAX_FILL_BYTES:
                raise UnsuitableFile("is a JPEG with too many bytes between its segments; save it again")
        scans += marker[1][0] == _START_OF_SCAN
        position = marker.end()
        if marker[1][0] >= _FIRST_WITH_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise UnsuitableFile("is a JPEG of too many segments; save it again")


def too_many_pixels(width: int, height: int, maximum: int) -> UnsuitableFile:
    return UnsuitableFile(f"has {width}x{height} pixels; at most {maximum} are accepted")


def _animated() -> UnsuitableFile:
    return UnsuitableFile("is animated; send a single image")
