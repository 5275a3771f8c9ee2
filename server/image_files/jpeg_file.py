"""Reading the segments of a JPEG."""

import re
import struct

from server.image_files import icc_profiles
from server.image_files.image_file import MAX_PARTS, ImageFile, UnsuitableFile, damaged, too_many_parts, truncated

MAX_SCAN_SEGMENTS = 1024  # behind the first scan

# Within the coefficients of a scan, FF is followed by 00 or a restart marker.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_START, _END, _SCAN, _FIRST_WITH_LENGTH = 0xD8, 0xD9, 0xDA, 0xC0
_TABLES = (0xC4, 0xCC, 0xDB, 0xDD)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_UNSUPPORTED = {
    **dict.fromkeys((0xC3, 0xCB), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
}
_ARITHMETIC = (0xC9, 0xCA)
_COLOURS = {1: "GRAY", 3: "RGB ", 4: "CMYK"}
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


def read_jpeg(data: bytes) -> ImageFile:
    """Raise `UnsuitableFile` for what no decoder could read."""
    kept, metadata, frame, position = [data[:2]], dict[bytes, list[bytes]](), b"", 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, position)
        if found is None:
            raise truncated("JPEG", "before its pixels")
        marker, position = found[1][0], found.end()
        if marker < _FIRST_WITH_LENGTH or marker == _START:
            continue
        if marker == _END:
            raise damaged("JPEG", "it has no pixels")
        start, position = position, position + int.from_bytes(data[position : position + 2], "big")
        if position < start + 2 or position > len(data):
            raise truncated("JPEG", "before its pixels")
        body = data[start + 2 : position]
        if marker in _FRAMES:
            _check_frame(marker, body)
            frame = body
        if marker == _SCAN:
            if not frame:
                raise damaged("JPEG", "it has no header (SOF segment) before its pixels")
            return _file(data, start - 2, kept, metadata, frame)
        if marker in _FRAMES or marker in _TABLES or _changes_colours(marker, body):
            kept += (bytes((0xFF, marker)), data[start:position])
        else:
            _collect(marker, body, metadata)
    raise too_many_parts("JPEG", "segments")


def _file(data: bytes, pixels: int, kept: list[bytes], metadata: dict[bytes, list[bytes]], frame: bytes) -> ImageFile:
    scans, end = find_end(data, pixels)
    height, width, components = struct.unpack_from(">HHB", frame, 1)
    profile = _joined_profile(metadata.get(_ICC, []))
    space = _COLOURS[components]
    return ImageFile(
        "JPEG",
        b"".join((*kept, memoryview(data)[pixels:end])),
        (width, height),
        space,
        profile=profile if icc_profiles.fits(profile, space, "RGB " if space == "GRAY" else space) else None,
        exif=metadata.get(_EXIF, [b""])[0],
        xmp=metadata.get(_XMP, [b""])[0],
        scans=scans,
    )


def find_end(data: bytes, position: int) -> tuple[int, int]:
    """Return the number of scans from `position` on, and where the image ends: phones put films behind it."""
    scans = 0
    for _ in range(MAX_SCAN_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            return scans, len(data)
        if found[1][0] == _END:
            return scans, found.end()
        scans += found[1][0] == _SCAN
        position = found.end()
        if found[1][0] >= _FIRST_WITH_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise UnsuitableFile(f"is a JPEG file of more than {MAX_SCAN_SEGMENTS} segments between its pixels; save it again")


def explain(data: bytes) -> UnsuitableFile:
    """Say why a file from `read_jpeg` could not be decoded."""
    if not data.endswith(b"\xff\xd9"):
        return truncated("JPEG", "before its last row of pixels")
    if any(b"\xff" + bytes([marker]) in data[:2000] for marker in _ARITHMETIC):
        return _unsupported("arithmetic")
    return damaged("JPEG", "its pixels cannot be decoded")


def _check_frame(marker: int, body: bytes) -> None:
    if marker in _UNSUPPORTED:
        raise _unsupported(_UNSUPPORTED[marker])
    if len(body) < 6:
        raise damaged("JPEG", "its header is too short")
    bits, height, _, components = struct.unpack_from(">BHHB", body)
    if bits != 8:
        raise UnsuitableFile(f"is a JPEG of {bits} bits per sample; save it with 8, or as a PNG")
    if height == 0:
        raise UnsuitableFile("is a JPEG without its height in the header (DNL); save it again")
    if components not in _COLOURS:
        raise UnsuitableFile(f"is a JPEG of {components} components; save it as RGB, grey or CMYK")


def _unsupported(coding: str) -> UnsuitableFile:
    return UnsuitableFile(f"is a JPEG with {coding} coding, which is not supported; save it as a baseline JPEG")


def _changes_colours(marker: int, body: bytes) -> bool:
    return (marker == 0xE0 and body.startswith(b"JFIF\0")) or (marker == 0xEE and body.startswith(b"Adobe"))


def _collect(marker: int, body: bytes, metadata: dict[bytes, list[bytes]]) -> None:
    for known, prefix in ((0xE1, _EXIF), (0xE1, _XMP), (0xE2, _ICC)):
        if marker == known and body.startswith(prefix):
            metadata.setdefault(prefix, []).append(body[len(prefix) :])


def _joined_profile(parts: list[bytes]) -> bytes:
    """Join the parts (number, count, data); return nothing if one is missing."""
    numbered = {part[0]: part[2:] for part in parts if len(part) > 2}
    count = max((part[1] for part in parts if len(part) > 2), default=0)
    return b"".join(numbered[number] for number in sorted(numbered)) if len(numbered) == count else b""
