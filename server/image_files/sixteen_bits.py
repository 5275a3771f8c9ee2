"""Decoding PNG files of 16 bits: Pillow keeps the high byte of a sample, except of grey without alpha."""

import io
import zlib
from dataclasses import replace

from PIL import Image as PillowImage
from PIL import ImageChops
from PIL.Image import Image

from server.image_files.icc_curves import sixteen_bit_tables
from server.image_files.image_file import ImageFile

_DEPTH, _TYPE, _HEADER_END = 24, 25, 29  # offsets in a PNG
_HIGH_BYTES = [value >> 8 for value in range(65536)]


def decode_sixteen_bits(file: ImageFile) -> tuple[Image, bytes | None]:
    """Return L, LA, RGB or RGBA, and the profile that it has."""
    channels = _channels(file)
    colours = 1 if file.colours == "GRAY" else 3
    converted = None if file.profile is None else sixteen_bit_tables(file.profile)
    tables, profile = converted or ([_HIGH_BYTES], file.profile)
    bands = [_mapped(channel, tables[min(i, len(tables) - 1)]) for i, channel in enumerate(channels[:colours])]
    if colours == 1 and converted:
        profile = None  # grey has no colours to convert
    if file.transparent:
        bands.append(_opaque(channels, file.transparent))
    elif len(channels) > colours:
        bands.append(_mapped(channels[-1], _HIGH_BYTES))
    return PillowImage.merge({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(bands)], bands), profile


def _channels(file: ImageFile) -> list[Image]:
    """Return each channel with all its bits."""
    if file.data[_TYPE] == 0:
        return [_load(file)]
    if file.data[_TYPE] == 4:  # bytes and filters are those of 8-bit RGBA
        header = file.data[12:_DEPTH] + b"\x08\x06" + file.data[_TYPE + 1 : _HEADER_END]
        checksum = zlib.crc32(header).to_bytes(4, "big")
        same = replace(file, data=file.data[:12] + header + checksum + file.data[_HEADER_END + 4 :])
        high, low, high_alpha, low_alpha = _load(same).split()
        return [_joined(high, low), _joined(high_alpha, low_alpha)]
    high, low = _load(file), _load(file, "16L")
    return [_joined(high.getchannel(band), low.getchannel(band)) for band in high.getbands()]


def _load(file: ImageFile, layout: str = "") -> Image:
    image = PillowImage.open(io.BytesIO(file.data), formats=("PNG",))
    if layout:  # "16L" takes the second byte of each sample, "16B" the first
        tile = image.tile[0]
        image.tile = [tile._replace(args=f"{image.mode};{layout}")]
    image.load()
    return image


def _joined(high: Image, low: Image) -> Image:
    return PillowImage.frombytes("I;16", high.size, PillowImage.merge("LA", (low, high)).tobytes())  # little-endian


def _mapped(channel: Image, table: list[int]) -> Image:
    return channel.convert("I").point(table, "L")  # the only mode that tables of 65536 are for


def _opaque(channels: list[Image], transparent: tuple[int, ...]) -> Image:
    """Return an alpha channel that is 0 where all channels have the transparent colour."""
    alpha = PillowImage.new("L", channels[0].size)
    for channel, value in zip(channels, transparent, strict=True):
        table = [255] * 65536
        table[value] = 0
        alpha = ImageChops.lighter(alpha, _mapped(channel, table))
    return alpha
