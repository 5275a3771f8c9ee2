"""Reading the chunks of a WEBP."""

import struct

from server.image_files import icc_profiles
from server.image_files.image_file import MAX_PARTS, ImageFile, animated, damaged, too_many_parts, truncated

_KEPT = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_READ = (*_KEPT, b"ICCP", b"EXIF", b"XMP ")
_PIXELS = (b"ANMF", b"VP8 ", b"VP8L")
_ALPHA_AND_ANIMATION = 0x12  # flags of VP8X that the kept chunks justify


def read_webp(data: bytes) -> ImageFile:
    """Raise `UnsuitableFile` for what no decoder could read."""
    chunks = _walk(data)
    if not any(kind in chunks for kind in _PIXELS):
        raise truncated("WEBP", "before its pixels")
    size = _size(chunks)
    profile = chunks.get(b"ICCP", b"")
    if b"VP8X" in chunks:
        chunks[b"VP8X"] = bytes([chunks[b"VP8X"][0] & _ALPHA_AND_ANIMATION]) + chunks[b"VP8X"][1:]
    kept = [(kind, chunks[kind]) for kind in _KEPT if kind in chunks]
    body = b"".join(
        part for kind, chunk in kept for part in (kind, struct.pack("<I", len(chunk)), chunk, bytes(len(chunk) % 2))
    )
    return ImageFile(
        "WEBP",
        struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"WEBP") + body,
        size,
        profile=profile if icc_profiles.fits(profile, "RGB ") else None,
        exif=chunks.get(b"EXIF", b"").removeprefix(b"Exif\0\0"),
        xmp=chunks.get(b"XMP ", b""),
    )


def _walk(data: bytes) -> dict[bytes, bytes]:
    """Return the first chunk of each kind that is read."""
    position, chunks, declared = 12, dict[bytes, bytes](), int.from_bytes(data[4:8], "little")
    end = min(len(data), 8 + declared) if declared >= 12 else len(data)
    for _ in range(MAX_PARTS):
        if position + 8 > end:
            return chunks
        kind, length = struct.unpack_from("<4sI", data, position)
        start, position = position + 8, position + 8 + length + length % 2
        if kind not in _READ:
            continue
        if kind in chunks:
            if kind == b"ANMF":
                raise animated("WEBP")
            continue
        if start + length > len(data):
            if kind in _KEPT:
                raise truncated("WEBP", f"inside its {kind.decode().strip()} chunk")
            return chunks
        chunks[kind] = data[start : start + length]
    raise too_many_parts("WEBP", "chunks")


def _size(chunks: dict[bytes, bytes]) -> tuple[int, int]:
    """Return width and height of the canvas, which a decoder allocates before it decodes."""
    if b"VP8X" in chunks:
        canvas = chunks[b"VP8X"][4:10]
        if len(canvas) < 6:
            raise damaged("WEBP", "its VP8X chunk is too short")
        return 1 + int.from_bytes(canvas[:3], "little"), 1 + int.from_bytes(canvas[3:], "little")
    if b"VP8 " in chunks and chunks[b"VP8 "][3:6] == b"\x9d\x01\x2a" and len(chunks[b"VP8 "]) >= 10:
        width, height = struct.unpack_from("<HH", chunks[b"VP8 "], 6)
        return width & 0x3FFF, height & 0x3FFF
    if chunks.get(b"VP8L", b"")[:1] == b"\x2f" and len(chunks[b"VP8L"]) >= 5:
        bits = int.from_bytes(chunks[b"VP8L"][1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise damaged("WEBP", "its header is not valid")
