"""Reading the chunks of a PNG."""

import struct
import zlib

from server.image_files import icc_profiles
from server.image_files.image_file import (
    MAX_PARTS,
    ImageFile,
    UnsuitableFile,
    animated,
    damaged,
    too_many_parts,
    truncated,
)

MAX_PROFILE_BYTES = 64 * 2**20  # unpacked

_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_GREY, _PALETTE, _WITH_ALPHA = (0, 4), 3, (4, 6)
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")  # a wrong checksum makes these unusable, others are skipped with one
_READ = {*_PIXELS, b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf", b"acTL", b"CgBI"}
_XMP = b"XML:com.adobe.xmp\0\0\0"
_INFLATE_BYTES = 2**20


def read_png(data: bytes) -> ImageFile:
    """Raise `UnsuitableFile` for what no decoder could read."""
    chunks, pixels, xmp = _walk(data)
    if b"CgBI" in chunks:
        raise UnsuitableFile("is a PNG in Apple's own variant for apps (CgBI); save it as a standard PNG")
    width, height, depth, colour_type = _header(chunks.get(b"IHDR"))
    if chunks.get(b"acTL", b"")[:4] > b"\0\0\0\1":
        raise animated("PNG")
    if not pixels:
        raise damaged("PNG", "it has no pixels (no IDAT chunk)")
    if colour_type == _PALETTE and b"PLTE" not in chunks:
        raise damaged("PNG", "it has no palette (no PLTE chunk)")
    transparent = _transparent(chunks.get(b"tRNS", b""), depth, colour_type)
    deep = transparent if depth == 16 else ()  # Pillow would compare it with 8 bits
    chunks[b"tRNS"] = b"" if deep else _transparency_chunk(transparent, colour_type)
    chunks[b"IDAT"] = b"".join(pixels)
    grey = colour_type in _GREY
    kept = [part for kind in _PIXELS if chunks.get(kind) for part in _chunk(kind, chunks[kind])]
    return ImageFile(
        "PNG",
        b"".join((data[:8], *kept, *_chunk(b"IEND", b""))),
        (width, height),
        "GRAY" if grey else "RGB ",
        depth,
        colour_type in _WITH_ALPHA or bool(transparent),
        deep,
        _profile(chunks, "GRAY" if grey else "RGB "),
        chunks.get(b"eXIf", b""),
        xmp,
    )


def check_pixels(data: bytes) -> None:
    """Inflate the pixels of a file from `read_png`; raise `UnsuitableFile` if they are incomplete or damaged."""
    chunks, pixels, _ = _walk(data)
    missing = _inflated_bytes(chunks[b"IHDR"])
    inflater, packed = zlib.decompressobj(), pixels[0]
    try:
        while missing > -_INFLATE_BYTES and not inflater.eof and packed:
            missing -= len(inflater.decompress(packed, _INFLATE_BYTES))
            packed = inflater.unconsumed_tail
    except zlib.error as error:
        raise damaged("PNG", f"its pixels cannot be inflated ({error})") from None
    if missing > 0:
        raise truncated("PNG", "before its last row of pixels")


def _walk(data: bytes) -> tuple[dict[bytes, bytes], list[memoryview], bytes]:
    """Return the first chunk of each kind that is read, all IDAT chunks, and XMP."""
    view, position, chunks, pixels, xmp = memoryview(data), 8, dict[bytes, bytes](), list[memoryview](), b""
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            if not pixels:
                raise truncated("PNG", "before its pixels")
            return chunks, pixels, xmp
        length, kind = struct.unpack_from(">I4s", data, position)
        body, position = view[position + 8 : position + 8 + length], position + 12 + length
        if kind == b"IEND":
            return chunks, pixels, xmp
        if kind == b"iTXt" and not xmp and body[: len(_XMP)] == _XMP:
            xmp = bytes(body)
        if kind not in _READ or (kind in chunks and kind != b"IDAT"):
            continue
        if len(body) < length and kind in _PIXELS:
            raise truncated("PNG", f"inside its {kind.decode()} chunk")
        checksum = view[position - 4 : position]
        if len(checksum) == 4 and zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            if kind in _PIXELS:
                raise damaged("PNG", f"the checksum (CRC) of its {kind.decode()} chunk is wrong")
            continue
        if kind == b"IDAT":
            pixels.append(body)
        elif len(body) == length:
            chunks[kind] = bytes(body)
    raise too_many_parts("PNG", "chunks")


def _header(header: bytes | None) -> tuple[int, int, int, int]:
    """Return width, height, depth and colour type."""
    if header is None or len(header) != 13:
        raise damaged("PNG", "it has no header (IHDR chunk)")
    width, height, depth, colour_type, compression, filters, interlaced = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(colour_type, ()) or compression or filters or interlaced > 1:
        raise damaged("PNG", f"its header is not valid (colour type {colour_type} with {depth} bits)")
    return width, height, depth, colour_type


def _transparent(body: bytes, depth: int, colour_type: int) -> tuple[int, ...]:
    """Return the alpha of each colour of a palette, or the samples of the transparent colour."""
    if colour_type == _PALETTE:
        return tuple(body[:256])
    samples = {0: 1, 2: 3}.get(colour_type, 0)
    if len(body) < 2 * samples:
        return ()
    values = (value & (2**depth - 1) for value in struct.unpack_from(f">{samples}H", body))
    return tuple(value * 255 // (2**depth - 1) if depth < 8 else value for value in values)  # as Pillow decodes them


def _transparency_chunk(transparent: tuple[int, ...], colour_type: int) -> bytes:
    return bytes(transparent) if colour_type == _PALETTE else struct.pack(f">{len(transparent)}H", *transparent)


def _inflated_bytes(header: bytes) -> int:
    width, height, depth, colour_type = _header(header)
    passes = _ADAM7 if header[12] else ((0, 0, 1, 1),)
    sides = [(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in passes]
    return sum(rows * (1 + -(-columns * depth * _SAMPLES[colour_type] // 8)) for columns, rows in sides if columns)


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, ...]:
    return struct.pack(">I4s", len(body), kind), body, zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")


def _profile(chunks: dict[bytes, bytes], space: str) -> bytes | None:
    """Return the ICC profile, in the order of precedence of the PNG specification."""
    cicp = chunks.get(b"cICP", b"")
    if icc_profiles.is_known_cicp(cicp):
        return icc_profiles.cicp_profile(cicp)
    if b"iCCP" in chunks:
        profile = _inflated_profile(chunks[b"iCCP"])
        if icc_profiles.fits(profile, space):
            return profile
    if b"sRGB" in chunks:
        return None
    return icc_profiles.gamma_profile(chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b""))


def _inflated_profile(body: bytes) -> bytes:
    """Return the profile of an iCCP chunk, as far as it can be inflated."""
    packed, inflater = body[body.find(b"\0") + 2 :], zlib.decompressobj()
    try:
        profile = inflater.decompress(packed, MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    if inflater.unconsumed_tail:
        raise UnsuitableFile(f"has a colour profile of more than {MAX_PROFILE_BYTES} bytes; save it with a smaller one")
    return profile
