"""Reading the tone curves of matrix and grey profiles, for pixels of more than 8 bits. No Pillow."""

import struct
from collections.abc import Callable, Iterator

from server.image_files.icc_profiles import SRGB_CURVE, matrix_profile

Curve = Callable[[float], float]

_MAX_TAGS = 100
_PARAMETERS = (1, 3, 4, 5, 7)  # by type of a parametric curve


def sixteen_bit_tables(profile: bytes) -> tuple[list[list[int]], bytes | None] | None:
    """Return a table per channel from 16 bits to 8 bits along sRGB's curve, and a profile of the result.

    8 bits of a linear image would be too few in its dark parts. None for a profile that is not of curves and a matrix.
    """
    try:
        tags = dict(_tags(profile))
        if b"A2B0" in tags or profile[20:24] != b"XYZ ":
            return None
        if profile[16:20] == b"GRAY":
            return [_table(_curve(tags[b"kTRC"]))], None
        colorants = [struct.unpack_from(">3i", tags[name], 8) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        tables = [_table(_curve(tags[name])) for name in (b"rTRC", b"gTRC", b"bTRC")]
    except (KeyError, ValueError, ArithmeticError, struct.error):
        return None
    return tables, matrix_profile([(x / 65536, y / 65536, z / 65536) for x, y, z in colorants], SRGB_CURVE)


def _tags(profile: bytes) -> Iterator[tuple[bytes, bytes]]:
    (count,) = struct.unpack_from(">I", profile, 128)
    for index in range(min(count, _MAX_TAGS)):
        name, start, size = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        yield name, profile[start : start + size]


def _table(curve: Curve) -> list[int]:
    return [_encoded(curve(value / 65535)) for value in range(65536)]


def _encoded(linear: float) -> int:
    gamma, a, b, c, threshold = SRGB_CURVE
    linear = min(1.0, max(0.0, linear))
    return round(255 * (linear / c if linear < c * threshold else (linear ** (1 / gamma) - b) / a))


def _curve(tag: bytes) -> Curve:
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        values = struct.unpack_from(f">{count}H", tag, 12) if count <= len(tag) else ()
        if len(values) > 1:
            return _interpolated(values)
        exponent = values[0] / 256 if values else 1.0
        return lambda x: x**exponent
    if tag[:4] != b"para":
        raise ValueError
    (kind,) = struct.unpack_from(">H", tag, 8)
    return _parametric(kind, [value / 65536 for value in struct.unpack_from(f">{_PARAMETERS[kind % 5]}i", tag, 12)])


def _interpolated(values: tuple[int, ...]) -> Curve:
    last = len(values) - 1

    def curve(x: float) -> float:
        index = min(last - 1, int(x * last))
        low, high = values[index], values[index + 1]
        return (low + (high - low) * (x * last - index)) / 65535

    return curve


def _parametric(kind: int, parameters: list[float]) -> Curve:
    """Return the curve of a type from 0 to 4 of the ICC specification."""
    gamma, a, b, c, d, e, f = parameters + [0.0] * (7 - len(parameters))
    if kind == 0:
        a = 1.0
    elif kind in (1, 2):
        c, d, e, f = 0.0, -b / a, c, c
    elif kind > 4:
        raise ValueError
    return lambda x: max(0.0, a * x + b) ** gamma + e if x >= d else c * x + f
