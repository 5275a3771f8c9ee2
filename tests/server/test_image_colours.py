"""Colours of uploads: converted to sRGB from whatever the file says they are in."""

import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from server.image_files.edit_input import EditInput, InvalidImage
from server.image_files.images import prepare
from tests.server.icc import ADOBE_RGB, DISPLAY_P3, cmyk_profile, grey_profile, in_srgb, rgb_profile
from tests.server.image_files import chunk, file_of, opened, patterned, png

ADOBE = rgb_profile(ADOBE_RGB, 2.19921875)
P3 = rgb_profile(DISPLAY_P3, 2.2)
EXACT: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}


def prepared(file: bytes, mask: bytes | None = None) -> EditInput:
    return prepare([file], mask, None, 2048 * 2048)


def source(file: bytes) -> Image.Image:
    return opened(prepared(file).source_images.files[0])


def worst(found: Image.Image, wanted: Image.Image) -> int:
    assert (found.mode, found.size) == (wanted.mode, wanted.size)
    return max(abs(a - b) for a, b in zip(found.tobytes(), wanted.tobytes(), strict=True))


def with_chunks(image: Image.Image, *chunks: bytes) -> bytes:
    file = file_of(image)
    return file[:33] + b"".join(chunks) + file[33:]


def encoded(linear: float) -> float:
    """Return sRGB's value of a linear intensity."""
    linear = min(1.0, max(0.0, linear))
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("profile", [ADOBE, P3, ADOBE + bytes(2**21)], ids=["Adobe RGB", "P3", "megabytes"])
def test_a_profile_is_converted_from_in_source_and_overlay(kind: str, profile: bytes) -> None:
    profile = struct.pack(">I", len(profile)) + profile[4:]
    file = file_of(patterned(), kind, icc_profile=profile, **EXACT[kind])
    wanted = in_srgb(opened(file) if kind == "JPEG" else patterned(), profile)
    mask = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    edit = prepared(file, file_of(mask))
    assert worst(opened(edit.source_images.files[0]), wanted) <= 1
    assert edit.source_images.overlay is not None
    assert worst(opened(edit.source_images.overlay).convert("RGB"), wanted) <= 1
    assert worst(wanted, patterned()) > 20


def test_transparent_parts_are_converted_before_they_become_white() -> None:
    image = patterned()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    converted = in_srgb(image.convert("RGB"), ADOBE)
    converted.putalpha(image.getchannel("A"))
    wanted = Image.alpha_composite(Image.new("RGBA", image.size, "white"), converted).convert("RGB")
    for kind in ("PNG", "WEBP"):
        assert worst(source(file_of(image, kind, icc_profile=ADOBE, **EXACT[kind])), wanted) <= 1
    palette = patterned().quantize(16)
    wanted = in_srgb(palette.convert("RGB"), P3)
    assert worst(source(file_of(palette, icc_profile=P3)), wanted) <= 1


def test_grey_and_cmyk_profiles() -> None:
    grey, linear = patterned().convert("L"), grey_profile(1.0)
    table = [round(encoded(v / 255)) for v in range(256)] * 3
    wanted = grey.convert("RGB").point(table)
    assert worst(source(file_of(grey, icc_profile=linear)), wanted) <= 1
    assert worst(source(file_of(grey.convert("LA"), icc_profile=linear)), wanted) <= 1
    photo = file_of(patterned().convert("CMYK"), "JPEG", icc_profile=cmyk_profile(), **EXACT["JPEG"])
    assert worst(source(photo), in_srgb(opened(photo), cmyk_profile())) <= 1
    assert worst(source(photo), opened(photo).convert("RGB")) > 50
    jpeg = file_of(grey, "JPEG", icc_profile=rgb_profile(ADOBE_RGB, 1.0), **EXACT["JPEG"])
    assert worst(source(jpeg), opened(jpeg).convert("RGB").point(table)) <= 2


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    "profile",
    [b"\0" * 300, ADOBE[:140], b"x", grey_profile(1.0), cmyk_profile(), ADOBE[:12] + b"link" + ADOBE[16:]],
    ids=["zeros", "truncated", "short", "grey", "cmyk", "link"],
)
def test_a_profile_that_does_not_fit_is_ignored(kind: str, profile: bytes) -> None:
    file = file_of(patterned(), kind, icc_profile=profile, **EXACT[kind])
    assert source(file).tobytes() == opened(file).convert("RGB").tobytes()
    if kind == "PNG":
        grey = patterned().convert("L")
        assert source(file_of(grey, icc_profile=ADOBE)).tobytes() == grey.convert("RGB").tobytes()


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8, 0.5])
def test_gamma_of_a_png(gamma: float) -> None:
    wanted = patterned().point([round(encoded((v / 255) ** (1 / gamma))) for v in range(256)] * 3)
    gama = chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    assert worst(source(with_chunks(patterned(), gama)), wanted) <= 2
    grey = patterned().convert("L")
    assert worst(source(with_chunks(grey, gama)), source(with_chunks(grey))) > 5
    for wins in (chunk(b"sRGB", b"\0"), chunk(b"cICP", b"\x01\x0d\0\x01")):
        assert source(with_chunks(patterned(), gama, wins)).tobytes() == patterned().tobytes()
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(ADOBE))
    assert worst(source(with_chunks(patterned(), gama, profile)), in_srgb(patterned(), ADOBE)) <= 1


SRGB_CHRM = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_CHRM = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


def test_chromaticities_of_a_png() -> None:
    gamma, chrm = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", struct.pack(">8I", *SRGB_CHRM))
    assert source(with_chunks(patterned(), gamma, chrm)).tobytes() == patterned().tobytes()
    for broken in (bytes(32), b"\xff" * 32, struct.pack(">8I", *[30000] * 8), b"short"):
        file = with_chunks(patterned(), chunk(b"gAMA", bytes(4)), chunk(b"cHRM", broken))
        assert source(file).tobytes() == patterned().tobytes()
    colours = Image.new("RGB", (96, 64), (180, 60, 60))
    chrm = chunk(b"cHRM", struct.pack(">8I", *ADOBE_CHRM))
    adobe = with_chunks(colours, chunk(b"gAMA", struct.pack(">I", 45470)), chrm)
    assert worst(source(adobe), in_srgb(colours, ADOBE)) <= 4  # sRGB's curve for 1/2.2


def test_coding_independent_code_points_of_a_png() -> None:
    p3 = chunk(b"cICP", b"\x0c\x0d\0\x01")
    colours = Image.new("RGB", (96, 64), (180, 200, 60))
    found = source(with_chunks(colours, p3)).getpixel((5, 5))
    assert isinstance(found, tuple)
    # Display P3 to sRGB by the matrices of CSS Color 4.
    r, g, b = (((v / 255 + 0.055) / 1.055) ** 2.4 for v in (180, 200, 60))
    wanted = (
        encoded(1.2249402 * r - 0.2249402 * g),
        encoded(-0.0420570 * r + 1.0420570 * g),
        encoded(-0.0196376 * r - 0.0786361 * g + 1.0982737 * b),
    )
    assert all(abs(a - b) <= 2 for a, b in zip(found, wanted, strict=True)), (found, wanted)
    for unknown in (b"\x02\x02\0\x01", b"\x01\x0d\x05\x01", b"\x0c"):
        assert source(with_chunks(patterned(), chunk(b"cICP", unknown))).tobytes() == patterned().tobytes()
    for hdr, name in ((b"\x09\x10\0\x01", "PQ"), (b"\x09\x12\0\x01", "HLG"), (b"\x01\x0d\0\0", "narrow range")):
        with pytest.raises(InvalidImage, match=name):
            prepared(with_chunks(patterned(), chunk(b"cICP", hdr)))


def test_one_transparent_colour_at_any_depth() -> None:
    for depth, value, row in ((2, 2, b"\xaa" * 24), (4, 5, b"\x55" * 48), (1, 1, b"\xff" * 12), (8, 9, b"\x09" * 96)):
        file = png(96, 64, depth, 0, row, extra=chunk(b"tRNS", struct.pack(">H", value)))
        assert source(file).getextrema() == ((255, 255),) * 3, depth


def deep(colour_type: int, samples: int, *extra: bytes) -> bytes:
    """Return a 16-bit PNG whose samples rise to 1/16 of the range along a row, and to all of it at its end."""
    values = [min(65535, 40 * x + 7 * s) if x < 90 else 65535 - 900 * s for x in range(96) for s in range(samples)]
    if samples in (2, 4):
        values[samples - 1 :: samples] = [65535] * 96
    return png(96, 64, 16, colour_type, struct.pack(f">{96 * samples}H", *values), b"".join(extra))


@pytest.mark.parametrize(("colour_type", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_dark_parts_of_linear_16_bit_images(colour_type: int, samples: int) -> None:
    """8 bits of them would be 3 levels."""
    space = grey_profile(1.0) if samples < 3 else rgb_profile(ADOBE_RGB, 1.0)
    gama = chunk(b"gAMA", struct.pack(">I", 100_000))
    found = source(deep(colour_type, samples, gama))
    by_profile = source(deep(colour_type, samples, chunk(b"iCCP", b"x\0\0" + zlib.compress(space))))
    for x in range(96):
        values = [min(65535, 40 * x + 7 * s) if x < 90 else 65535 - 900 * s for s in range(3 if samples > 2 else 1)]
        wanted = [encoded(value / 65535) for value in values] * (1 if samples > 2 else 3)
        pixel, other = found.getpixel((x, 5)), by_profile.getpixel((x, 5))
        assert isinstance(pixel, tuple)
        assert isinstance(other, tuple)
        assert all(abs(a - b) <= 2 for a, b in zip(pixel, wanted, strict=True)), (x, pixel, wanted)
        assert samples > 2 or other == pixel


def test_a_transparent_16_bit_colour() -> None:
    """Its neighbours with the same high bytes are opaque."""
    colour = struct.pack(">3H", 40 * 20, 40 * 20 + 7, 40 * 20 + 14)
    found = source(deep(2, 3, chunk(b"tRNS", colour)))
    assert found.getpixel((20, 5)) == (255, 255, 255)
    assert found.getpixel((21, 5)) == (3, 3, 3)
    grey = source(deep(0, 1, chunk(b"tRNS", colour[:2])))
    assert (grey.getpixel((20, 5)), grey.getpixel((21, 5))) == ((255, 255, 255), (3, 3, 3))
