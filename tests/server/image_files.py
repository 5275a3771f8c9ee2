"""Image files of every kind, valid and invalid, for tests of uploads."""

import io
import struct
import zlib
from typing import Any

from PIL import Image, PngImagePlugin


def file_of(image: Image.Image, kind: str = "PNG", **save: Any) -> bytes:
    """Encode the image."""
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def plain(width: int = 96, height: int = 64, colour: Any = (200, 30, 40), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def patterned(width: int = 96, height: int = 64) -> Image.Image:
    """Return an image without equal neighbours, which looks different from every side."""
    image = Image.new("RGB", (width, height))
    image.putdata([(255 * x // width, 255 * y // height, (x * y) % 256) for y in range(height) for x in range(width)])
    return image


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def png(width: int, height: int, depth: int, colour_type: int, row: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG with all rows equal to `row`, of a mode that Pillow reads but does not write.

    Args:
        extra: chunks before the pixels (see `chunk`).
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    packer, line = zlib.compressobj(1), b"\0" + row
    pixels = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def animation(kind: str) -> bytes:
    return file_of(plain(), kind, save_all=True, append_images=[plain(colour=(0, 0, 255))])


def text_bomb() -> bytes:
    """Return a small PNG with 60 MB of text."""
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b" " * (PngImagePlugin.MAX_TEXT_CHUNK - 1)))
    return png(64, 64, 8, 0, b"\0" * 64, extra=text * 60)


def pixel_bomb(kind: str) -> bytes:
    """Return a small file whose header declares 144 to 4,000 million pixels."""
    if kind == "PNG":
        return png(20_000, 20_000, 1, 0, b"\0" * 2500)
    if kind == "JPEG":
        file = bytearray(file_of(plain(64, 64), "JPEG"))
        sides = file.index(b"\xff\xc0") + 5
        file[sides : sides + 4] = struct.pack(">HH", 65_000, 65_000)
        return bytes(file)
    file = bytearray(file_of(plain(64, 64), "WEBP", lossless=True))
    assert file[12:16] == b"VP8L"
    file[21:25] = struct.pack("<I", 11_999 | 11_999 << 14)
    return bytes(file)


def scan_bomb(side: int, scans: int) -> bytes:
    """Return a JPEG of `side` with further scans of 27 bytes or more, each of which visits every coefficient."""
    file = file_of(plain(side, side), "JPEG", progressive=True)
    table = (
        b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1, *[0] * 15]) + b"\xe0"
    )  # one code: "14 bits of blocks"
    blocks = (side // 8) ** 2
    bits = "011111111111111" * -(-blocks // 32767)  # 32767 blocks without changes each
    data = int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big").replace(b"\xff", b"\xff\0")
    refinement = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\x10" + data  # of all AC coefficients of the first component
    return file[:-2] + table + refinement * scans + file[-2:]


def many_chunks(kind: bytes, count: int) -> bytes:
    """Return a small PNG with `count` empty chunks before its pixels."""
    return png(64, 64, 8, 0, b"\0" * 64, extra=chunk(kind, b"") * count)
