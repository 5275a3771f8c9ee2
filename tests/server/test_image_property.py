"""Any image file gives the right pixels or an error that names the reason."""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose

from server.image_files.edit_input import InvalidImage
from server.image_files.images import prepare
from tests.server.icc import ADOBE_RGB, DISPLAY_P3, grey_profile, in_srgb, rgb_profile
from tests.server.image_files import chunk, file_of, opened
from tests.server.test_source_images import STORED_AS

WIDTH, HEIGHT = 72, 66
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
FORMS = [(d, t) for t in SAMPLES for d in (1, 2, 4, 8, 16) if (t, d) != (3, 16) and (d >= 8 or t in (0, 3))]
RGB_PROFILES = {"adobe": rgb_profile(ADOBE_RGB, 2.2), "p3": rgb_profile(DISPLAY_P3, 1.8, padding=2**21)}
METADATA = st.lists(
    st.sampled_from(
        [
            chunk(b"tEXt", b"prompt\0" + b"a" * 300_000),
            chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{" * 10**7)),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 10**6),
            chunk(b"tEXt", b"wrong checksum")[:-1] + b"?",
            chunk(b"pHYs", b"\0"),
            chunk(b"vpAg", bytes(9)) * 2000,
        ]
    ),
    max_size=4,
)


@dataclass
class Written:
    """A file and its pixels in the file's own colours: RGBA from 0 to 1, by row."""

    file: bytes
    pixels: list[list[tuple[float, float, float, float]]]


def sample(x: int, y: int, band: int) -> float:
    return ((x * (3 + band) + y * (7 - band)) % 97) / 96 if band < 3 else ((x + 2 * y) % 50) / 49


def written(depth: int, colour_type: int, interlaced: bool, chunks: bytes, tail: bytes, transparent: bool) -> Written:
    """Write a PNG by the specification alone."""
    top, samples = 2**depth - 1, SAMPLES[colour_type]
    bands = (0, 3) if samples == 2 else range(samples)
    grid = [[[round(sample(x, y, band) * top) for band in bands] for x in range(WIDTH)] for y in range(HEIGHT)]
    packed = b""
    for x0, y0, dx, dy in PASSES if interlaced else ((0, 0, 1, 1),):
        for y in range(y0, HEIGHT, dy):
            bits = "".join(f"{value:0{depth}b}" for x in range(x0, WIDTH, dx) for value in grid[y][x])
            packed += b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    palette = [((i * 37) % 256, (i * 91) % 256, (i * 151) % 256) for i in range(top + 1)] if colour_type == 3 else []
    if colour_type == 3:
        chunks += chunk(b"PLTE", b"".join(map(bytes, palette)))
    key = grid[5][7] if transparent and colour_type in (0, 2) else None
    if key is not None:
        chunks += chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour_type, 0, 0, interlaced)
    body = zlib.compress(packed)
    pixels = chunk(b"IDAT", body[:50]) + chunk(b"IDAT", b"") + chunk(b"IDAT", body[50:])
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + pixels + tail + chunk(b"IEND", b"")

    def rgba(values: list[int]) -> tuple[float, float, float, float]:
        colours = [value / 255 for value in palette[values[0]]] if palette else [value / top for value in values]
        alpha = colours.pop() if samples in (2, 4) else 0.0 if values == key else 1.0
        r, g, b = colours * 3 if len(colours) == 1 else colours
        return r, g, b, alpha

    return Written(file, [[rgba(values) for values in row] for row in grid])


def encoded(linear: float) -> float:
    linear = min(1.0, max(0.0, linear))
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def decoded(pixels: list[list[tuple[float, float, float, float]]], gamma: float | None) -> list[tuple[float, ...]]:
    """Return RGB on white, from 0 to 255."""
    return [
        tuple(255 * (1 - a + a * (v if gamma is None else encoded(v ** (1 / gamma)))) for v in (r, g, b))
        for row in pixels
        for r, g, b, a in row
    ]


def source(file: bytes) -> Image.Image:
    return opened(prepare([file], None, None, 2048 * 2048).source_images.files[0])


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    interlaced=st.booleans(),
    transparent=st.booleans(),
    gamma=st.sampled_from([None, 1.0, 0.55, 0.7]),
    named=st.sampled_from([b"", chunk(b"sRGB", b"\0"), chunk(b"cICP", b"\1\x0d\0\1"), chunk(b"iCCP", b"x\0\0broken")]),
    metadata=METADATA,
    tail=METADATA,
    left=st.floats(0, 1),
    cut=st.booleans(),
)
def test_any_png(
    form: tuple[int, int],
    interlaced: bool,
    transparent: bool,
    gamma: float | None,
    named: bytes,
    metadata: list[bytes],
    tail: list[bytes],
    left: float,
    cut: bool,
) -> None:
    gama = b"" if gamma is None else chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    png = written(*form, interlaced, named + gama + b"".join(metadata), b"".join(tail), transparent)
    last = png.file.rindex(b"IDAT")
    end_of_pixels = last + 4 + int.from_bytes(png.file[last - 4 : last], "big")
    size = int(left * len(png.file)) if cut else len(png.file)
    found, reason = None, ""
    try:
        found = source(png.file[:size])
    except InvalidImage as error:
        reason = error.message
    if size < end_of_pixels:
        assert "truncated" in reason or "empty" in reason
        return
    assert found is not None, reason
    wins = named in (chunk(b"sRGB", b"\0"), chunk(b"cICP", b"\1\x0d\0\1"))
    wanted = decoded(png.pixels, None if wins else gamma)
    flat = found.tobytes()
    for i, pixel in enumerate(wanted):
        assert all(abs(a - b) <= 2.1 for a, b in zip(flat[3 * i : 3 * i + 3], pixel, strict=True)), (i, pixel)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    mode=st.sampled_from(["L", "RGB", "RGBA", "P", "CMYK"]),
    profile=st.sampled_from([None, "adobe", "p3", "broken", "grey"]),
    orientation=st.integers(0, 9),
    progressive=st.booleans(),
    trailing=st.sampled_from([b"", b"\0" * 1000, b"\xff\xd8\xff\xda"]),
    left=st.floats(0, 0.9),
    cut=st.booleans(),
)
def test_any_file_of_pillow(
    kind: str,
    mode: str,
    profile: str | None,
    orientation: int,
    progressive: bool,
    trailing: bytes,
    left: float,
    cut: bool,
) -> None:
    mode = {("JPEG", "RGBA"): "RGB", ("JPEG", "P"): "L", ("PNG", "CMYK"): "RGB"}.get((kind, mode), mode)
    if kind == "WEBP" and mode not in ("RGB", "RGBA"):
        mode = "RGB"
    shown = Image.new("RGB", (96, 72))
    shown.putdata([(2 * x, 3 * y, 255 - x - y) for y in range(72) for x in range(96)])
    turn = STORED_AS.get(orientation)
    stored = (shown if turn is None else shown.transpose(turn)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    icc = RGB_PROFILES.get(profile or "", {"broken": bytes(500), "grey": grey_profile(1.0)}.get(profile or ""))
    save: dict[str, Any] = {"quality": 100, "progressive": progressive, "subsampling": 0, "lossless": True}
    file = file_of(stored, kind, exif=exif, **save, **({} if icc is None else {"icc_profile": icc}))
    if cut:
        file = file[: int(left * len(file_of(stored, kind, **save))) // 2]
        with pytest.raises(InvalidImage, match=r"truncated|empty"):
            source(file)
        return
    wanted = opened(file_of(stored, kind, **save))
    alpha = wanted.getchannel("A") if wanted.mode == "RGBA" else None
    if profile in RGB_PROFILES and mode != "CMYK" and not (kind == "PNG" and mode == "L"):
        wanted = in_srgb(wanted.convert("RGB"), RGB_PROFILES[profile or ""])
    elif profile == "grey" and mode == "L":
        wanted = wanted.point([round(255 * encoded(v / 255)) for v in range(256)])
    wanted = wanted.convert("RGB")
    if alpha is not None:
        wanted.paste((255, 255, 255), mask=alpha.point(lambda value: 255 - value))
    undone = {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
    turned = undone.get(orientation, turn)
    wanted = wanted if turned is None else wanted.transpose(turned)
    found = source(file + trailing)
    assert found.size == wanted.size
    assert max(abs(a - b) for a, b in zip(found.tobytes(), wanted.tobytes(), strict=True)) <= 2
