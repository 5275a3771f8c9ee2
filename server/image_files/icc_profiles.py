"""ICC profiles: which fit an image, and those that stand for a PNG's cICP, gAMA and cHRM chunks. No Pillow."""

import struct
from collections.abc import Sequence

from server.image_files.image_file import UnsuitableFile

_Vector = tuple[float, float, float]

_D65 = (0.3127, 0.3290)
_SRGB = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green, blue
_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
_PRIMARIES = {  # by code of ITU-T H.273
    1: _SRGB,
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, *_P3),
    12: (*_D65, *_P3),
}
# Parameters g, a, b, c, d of an ICC curve: (a x + b) ** g for x >= d, else c x.
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_CURVES: dict[int, tuple[float, ...]] = {  # by code of ITU-T H.273
    **dict.fromkeys((1, 6, 14, 15), _BT709_CURVE),
    4: (2.2,),
    5: (2.8,),
    8: (1.0,),
    13: SRGB_CURVE,
}
_HDR = {16: "PQ", 18: "HLG"}

_BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
_D50 = (0.9642, 1.0, 0.8249)
_SRGB_GAMMA = 0.45455  # of PNG files that mean sRGB's curve
_MAX_FIXED = 2.0**15


def fits(profile: bytes, *spaces: str) -> bool:
    """Tell whether a profile is for pixels of one of the colour spaces (ICC signatures)."""
    is_profile = len(profile) > 128 and profile[36:40] == b"acsp"
    is_device = profile[12:16] in (b"scnr", b"mntr", b"prtr", b"spac")
    return is_profile and is_device and profile[16:20] in [space.encode() for space in spaces]


def is_known_cicp(cicp: bytes) -> bool:
    """Tell whether a cICP chunk says how to convert; others are to be ignored."""
    if len(cicp) != 4:
        return False
    primaries, curve, matrix, full_range = cicp
    return primaries in _PRIMARIES and curve in {*_CURVES, *_HDR} and matrix == 0 and full_range <= 1


def cicp_profile(cicp: bytes) -> bytes | None:
    """Return the profile of a known cICP chunk; None for sRGB."""
    primaries, curve, _, full_range = cicp
    if curve in _HDR:
        raise UnsuitableFile(f"is a PNG in high dynamic range ({_HDR[curve]}); save it in sRGB or Display P3")
    if not full_range:
        raise UnsuitableFile("is a PNG in narrow range, as video (cICP chunk); save it in full range")
    return _profile(_PRIMARIES[primaries], _CURVES[curve])


def gamma_profile(gamma: bytes, chromaticities: bytes) -> bytes | None:
    """Return the profile of gAMA and cHRM chunks (b"" if absent); None for sRGB. What is not valid is ignored."""
    exponent = int.from_bytes(gamma[:4], "big") / 100_000
    primaries = tuple(value / 100_000 for value in struct.unpack_from(">8I", chromaticities.ljust(32, b"\0")))
    has_gamma, has_primaries = 0.01 <= exponent <= 10, all(0 < value <= 1 for value in primaries[1::2])
    means_srgb = not has_gamma or abs(exponent / _SRGB_GAMMA - 1) < 0.01
    return _profile(primaries if has_primaries else _SRGB, SRGB_CURVE if means_srgb else (1 / exponent,))


def _profile(primaries: Sequence[float], curve: Sequence[float]) -> bytes | None:
    is_srgb = all(abs(value - other) < 0.002 for value, other in zip(primaries, _SRGB, strict=True))
    if is_srgb and curve == SRGB_CURVE:
        return None
    colorants = _colorants(primaries)
    return None if colorants is None else matrix_profile(colorants, curve)


def matrix_profile(colorants: Sequence[_Vector], curve: Sequence[float]) -> bytes:
    """Write a profile of a display.

    Args:
        colorants: XYZ of red, green and blue, adapted to D50.
        curve: an exponent, or the parameters of `SRGB_CURVE`.
    """
    parametric = struct.pack(">4s4xHH", b"para", 0 if len(curve) == 1 else 3, 0) + _fixed(curve)
    tags = [(b"wtpt", _xyz(_D50)), (b"desc", _text("sRGB")), (b"cprt", _text(""))]
    tags += [(name + b"XYZ", _xyz(value)) for name, value in zip((b"r", b"g", b"b"), colorants, strict=True)]
    tags += [(name + b"TRC", parametric) for name in (b"r", b"g", b"b")]
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags:
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    header = struct.pack(">I4xI12s16s", size, 0x04200000, b"mntrRGB XYZ ", b"\x07\xe8\0\x01\0\x01\0\0\0\0\0\0acsp")
    return header.ljust(68, b"\0") + _fixed(_D50) + bytes(48) + struct.pack(">I", len(tags)) + table + data


def _colorants(primaries: Sequence[float]) -> list[_Vector] | None:
    """Return XYZ of red, green and blue at the intensities of white, adapted to D50; None if they span no space."""
    white, *columns = ((x / y, 1.0, (1 - x - y) / y) for x, y in zip(primaries[::2], primaries[1::2], strict=True))
    if abs(_determinant(columns)) < 1e-6:
        return None
    rows: list[_Vector] = list(zip(*columns, strict=True))
    scales = _solve(rows, white)
    cones, wanted = _times(_BRADFORD, white), _times(_BRADFORD, _D50)
    if not all(cone > 1e-6 for cone in cones):
        return None
    gains = [to / of for of, to in zip(cones, wanted, strict=True)]
    adapted = []
    for column, scale in zip(columns, scales, strict=True):
        response = _times(_BRADFORD, column)
        target = [scale * gain * value for gain, value in zip(gains, response, strict=True)]
        adapted.append(_solve(_BRADFORD, target))
    return adapted if all(abs(value) < _MAX_FIXED for colour in adapted for value in colour) else None


def _times(rows: Sequence[_Vector], vector: Sequence[float]) -> _Vector:
    x, y, z = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in rows)
    return x, y, z


def _solve(rows: Sequence[_Vector], target: Sequence[float]) -> _Vector:
    """Solve by Cramer's rule."""
    columns = list(zip(*rows, strict=True))
    replaced = ([target if other == i else columns[other] for other in range(3)] for i in range(3))
    x, y, z = (_determinant(matrix) / _determinant(columns) for matrix in replaced)
    return x, y, z


def _determinant(columns: Sequence[Sequence[float]]) -> float:
    (a, b, c), (d, e, f), (g, h, i) = columns
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _fixed(values: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return struct.pack(">4s4xII2s2sII", b"mluc", 1, 12, b"en", b"US", len(encoded), 28) + encoded
