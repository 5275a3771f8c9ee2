"""What is wrong with a file is named; what can be skipped is."""

import base64
import struct
import zlib

import pytest
from PIL import Image

from server.image_files import images as request_images
from server.image_files.edit_input import InvalidImage
from server.image_files.images import prepare
from tests.server.image_files import chunk, file_of, opened, patterned, plain, png

MAX_PIXELS = 2048 * 2048
IMAGE = file_of(patterned())


def source(file: bytes) -> Image.Image:
    return opened(prepare([file], None, None, MAX_PIXELS).source_images.files[0])


def refusal(file: bytes, mask: bytes | None = None) -> str:
    with pytest.raises(InvalidImage) as caught:
        prepare([file], mask, None, MAX_PIXELS)
    return caught.value.message


def box(brand: bytes) -> bytes:
    return struct.pack(">I4s4sI", 24, b"ftyp", brand, 0) + bytes(100)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (b"", "an empty file"),
        (bytes(5000), "zero bytes"),
        (file_of(plain(), "GIF"), "a GIF file"),
        (file_of(plain(), "BMP"), "a BMP file"),
        (file_of(plain(), "TIFF"), "a TIFF file"),
        (file_of(plain(), "JPEG2000"), "a JPEG 2000 file"),
        (file_of(plain(), "AVIF"), "an AVIF file"),
        (file_of(plain(), "ICO"), "an icon (ICO) file"),
        (box(b"heic"), "a HEIC"),
        (box(b"mif1"), "a HEIC"),
        (box(b"isom"), "a video"),
        (b"\xff\x0a" + bytes(100), "a JPEG XL file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG file"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg/>", "an SVG file"),
        (b"%PDF-1.7 ...", "a PDF file"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": {"message": "expired"}}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (base64.b64encode(IMAGE), "base64 text"),
        (b"data:image/png;base64," + base64.b64encode(IMAGE), "a data: URL"),
        (IMAGE.hex().encode(), "hexadecimal text"),
        (repr(IMAGE).encode(), "a Python bytes literal"),
        (IMAGE.decode("latin-1").encode(), "changed on its way"),
        (IMAGE.decode("utf-8", "replace").encode(), "changed on its way"),
        (IMAGE.replace(b"\r\n", b"\n"), "changed on its way"),
        (b"\r\n" + IMAGE, "2 bytes that do not belong to the PNG file"),
        (IMAGE[:6], "a truncated file of 6 bytes"),
        (b"just some words", "is text"),
        (b"\x01\x02\xfe\xff" * 99, "is not an image"),
    ],
    ids=range(30),
)
def test_other_files_are_called_what_they_are(file: bytes, name: str) -> None:
    message = refusal(file)
    assert name in message
    assert message.endswith("send a PNG, JPEG or WEBP file.")
    assert refusal(IMAGE, file).endswith("send a PNG file with an alpha channel.")


def flipped(file: bytes, position: int) -> bytes:
    return file[:position] + bytes([file[position] ^ 1]) + file[position + 1 :]


def idat(pixels: bytes, row: bytes = b"") -> bytes:
    return IMAGE[:33] + row + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(marker: int = 0xC0, bits: int = 8, components: int = 3, height: int = 64) -> bytes:
    file = bytearray(file_of(patterned(), "JPEG"))
    frame = file.index(b"\xff\xc0")
    file[frame + 1], file[frame + 4], file[frame + 9] = marker, bits, components
    file[frame + 5 : frame + 7] = struct.pack(">H", height)
    return bytes(file)


def short_png(depth: int, colour_type: int, bytes_per_pixel: int, extra: bytes = b"") -> bytes:
    """Return a PNG of 96x64 with 63 rows of pixels."""
    header = struct.pack(">IIBBBBB", 96, 64, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\1" * 96 * bytes_per_pixel) * 63)
    return IMAGE[:8] + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PIXELS = zlib.compress(b"".join(b"\0" + patterned().tobytes()[y * 288 : (y + 1) * 288] for y in range(64)))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (flipped(IMAGE, 20), "checksum (CRC) of its IHDR chunk"),
        (flipped(IMAGE, 100), "checksum (CRC) of its IDAT chunk"),
        (flipped(file_of(patterned().quantize(8)), 50), "checksum (CRC) of its PLTE chunk"),
        (idat(flipped(PIXELS, 300)), "cannot be inflated"),
        (idat(flipped(PIXELS, len(PIXELS) - 1)), "cannot be inflated"),
        (idat(PIXELS[:-200]), "truncated, it ends before its last row"),
        (idat(zlib.compress(zlib.decompress(PIXELS)[:-1])), "truncated, it ends before its last row"),
        (short_png(16, 0, 2, chunk(b"tRNS", b"\0\1")), "truncated, it ends before its last row"),
        (short_png(8, 6, 4), "truncated, it ends before its last row"),
        (short_png(8, 3, 1, chunk(b"PLTE", bytes(9))), "truncated, it ends before its last row"),
        (IMAGE[:33] + chunk(b"IEND", b""), "no IDAT"),
        (IMAGE[:8] + IMAGE[33:], "no header"),
        (png(96, 64, 8, 3, b"\0" * 96), "no palette"),
        (png(96, 64, 16, 3, b"\0" * 192), "colour type 3 with 16 bits"),
        (IMAGE[:8] + chunk(b"CgBI", b"\x50\0\x20\2") + IMAGE[8:], "CgBI"),
        (jpeg(marker=0xC3), "lossless"),
        (jpeg(marker=0xC5), "hierarchical"),
        (jpeg(bits=12), "12 bits"),
        (jpeg(components=2), "2 components"),
        (jpeg(height=0), "DNL"),
        (file_of(patterned(), "JPEG", progressive=True)[:-300], "truncated"),
        (file_of(patterned(), "WEBP")[:-100], "truncated, it ends inside its VP8 chunk"),
    ],
    ids=range(22),
)  # fmt: skip
def test_what_is_wrong_is_named(file: bytes, reason: str) -> None:
    assert reason in refusal(file)


def png_with(*chunks: bytes, at: int = 33) -> bytes:
    return IMAGE[:at] + b"".join(chunks) + IMAGE[at:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    file = file_of(patterned(), "JPEG")
    parts = (bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return file[:2] + b"".join(parts) + file[2:]


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    file = file_of(patterned(), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    parts = (kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    body = file[12:] + b"".join(parts)
    return file[:4] + struct.pack("<I", len(body) + 4) + b"WEBP" + body


TEXT = zlib.compress(b" " * 10**7)
END = len(IMAGE) - 12
XMP = b"http://ns.adobe.com/xap/1.0/\0"


@pytest.mark.parametrize(
    "file",
    [
        png_with(chunk(b"tEXt", b"workflow\0" + b"{}" * 10**6)),
        png_with(chunk(b"zTXt", b"workflow\0\0" + TEXT)),
        png_with(chunk(b"iTXt", b"workflow\0\1\0\0\0" + TEXT)),
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<x/>" * 10**6)),
        png_with(*[chunk(b"zTXt", b"%d\0\0" % n + TEXT) for n in range(20)], at=END),
        png_with(chunk(b"zTXt", b"x\0\7broken"), chunk(b"iTXt", b"\0"), chunk(b"tEXt", b"")),
        png_with(flipped(chunk(b"tEXt", b"a\0b"), 10), flipped(chunk(b"gAMA", b"\0\1\x86\xa0"), 9)),
        png_with(*[chunk(b"gAMA", b"\0"), chunk(b"cHRM", b"\0"), chunk(b"pHYs", b""), chunk(b"tRNS", b"\0")]),
        png_with(chunk(b"iCCP", b"no end"), chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff" + bytes(10**6))),
        png_with(*[chunk(b"iCCP", b"x\0\0" + TEXT)] * 20),
        png_with(chunk(b"acTL", b"\0\0\0\1\0\0\0\0"), chunk(b"fcTL", bytes(26))),
        IMAGE[:END] + chunk(b"tEXt", bytes(1000))[:500],
        IMAGE[:END],
        IMAGE + b"trailing" * 1000,
        jpeg_with(*[(0xE1, XMP + bytes(60_000))] * 100),
        jpeg_with(*[(0xE2, b"ICC_PROFILE\0" + bytes([n, 200]) + bytes(60_000)) for n in range(1, 201)]),
        jpeg_with(*[(0xED, b"Photoshop 3.0\0" + b"8BIM" * 99)] * 500, (0xE2, b"MPF\0" + bytes(99)), (0xFE, b"")),
        jpeg_with((0xE1, b"Exif\0\0" + b"II*\0" + b"\xff" * 50_000), (0xEB, b"JP" + bytes(60_000))),
        file_of(patterned(), "JPEG") + file_of(plain(), "JPEG") * 3 + bytes(10**6),
        webp_with((b"XMP ", bytes(10**7)), *[(b"abcd", b"odd")] * 1000),
        webp_with() + b"trailing",
        webp_with((b"XMP ", bytes(1000)))[:-500],
    ],
    ids=range(22),
)  # fmt: skip
def test_metadata_never_fails_an_image(file: bytes) -> None:
    wanted = opened(file_of(patterned(), "JPEG")) if file[:2] == b"\xff\xd8" else patterned()
    assert source(file).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("WEBP", "RGB")]
)
def test_large_photos_are_made_smaller(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if images were halved from 6200 pixels on."""
    monkeypatch.setattr(request_images, "FULL_PIXELS", 6200)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.linear_gradient("L").resize((201, 121)).convert("RGB")
    photo.paste((200, 30, 40), (0, 0, 100, 121))
    stored = photo.convert(mode).transpose(Image.Transpose.ROTATE_90)
    mask = plain(201, 121, (0, 0, 0, 255), "RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 100, 121))
    edit = prepare([file_of(stored, kind, exif=exif)], file_of(mask), None, 96 * 64)
    found, wanted = opened(edit.source_images.files[0]), photo.convert(mode).convert("RGB").resize((101, 61))
    assert abs(found.width - 101) <= 2
    assert edit.source_images.overlay is not None
    overlay = opened(edit.source_images.overlay)
    assert (overlay.getpixel((10, 30))[3], overlay.getpixel((overlay.width - 10, 30))[3]) == (0, 255)  # type: ignore[index]
    for x, y in ((20, 10), (90, 20), (90, 50)):
        assert all(abs(a - b) < 12 for a, b in zip(found.getpixel((x, y)), wanted.getpixel((x, y)), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (8064, 6048)), ("PNG", (8064, 6048)), ("WEBP", (6000, 4000))])
def test_photos_of_phones(kind: str, size: tuple[int, int]) -> None:
    edit = prepare([file_of(plain(*size), kind)], None, None, MAX_PIXELS)
    assert max(edit.size) == 2048


def test_the_mask_of_a_wrong_kind() -> None:
    webp, small = file_of(plain(mode="RGBA", colour=(0, 0, 0, 0)), "WEBP"), file_of(plain(95, 64, (0, 0, 0, 0), "RGBA"))
    assert "is a WEBP file; it must be a PNG with an alpha channel" in refusal(IMAGE, webp)
    assert "is a JPEG file; it must be a PNG with an alpha channel" in refusal(IMAGE, file_of(plain(), "JPEG"))
    assert "has no alpha channel; it must be a PNG" in refusal(IMAGE, file_of(plain(mode="L", colour=0)))
    assert "95x64 pixels and the first image 96x64" in refusal(IMAGE, small)
