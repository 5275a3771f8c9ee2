"""ICC profiles as files contain them."""

import io
import struct
from collections.abc import Sequence

from PIL import Image, ImageCms

D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _packed(space: bytes, kind: bytes, tags: dict[bytes, bytes], padding: int) -> bytes:
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(tags)) + table + data + bytes(padding)
    header = struct.pack(">I4xI4s4s4s12x4s", 128 + len(body), 0x02100000, kind, space, b"XYZ ", b"acsp")
    return header.ljust(68, b"\0") + _fixed(*D50) + bytes(48) + body


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(colorants: Sequence[Sequence[float]], gamma: float, padding: int = 0) -> bytes:
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50)}
    for name, value in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + _fixed(*value), name + b"TRC": _curve(gamma)}
    return _packed(b"RGB ", b"mntr", tags, padding)


def grey_profile(gamma: float) -> bytes:
    return _packed(b"GRAY", b"mntr", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), b"kTRC": _curve(gamma)}, 0)


def cmyk_profile() -> bytes:
    """Return a printer's profile of two grid points: L* 100 without ink, less with each ink, a* and b* by colour."""
    table = b""
    for inks in range(16):
        c, m, y, k = inks >> 3 & 1, inks >> 2 & 1, inks >> 1 & 1, inks & 1
        lightness = max(5, 100 - 30 * c - 35 * m - 8 * y - 85 * k)
        a, b = (1 - k) * (60 * m - 30 * c), (1 - k) * (70 * y - 40 * c)
        table += bytes((round(lightness * 2.55), 128 + a, 128 + b))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + table + ramp * 3
    profile = _packed(b"CMYK", b"prtr", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), b"A2B0": lut}, 0)
    return profile[:20] + b"Lab " + profile[24:]


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert by littlecms."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return converted
