"""Uploads for an edit: the correct source image or a clear error, at little cost."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose

from engine.geometry import edit_size, source_tokens
from server.image_files import images as request_images
from server.image_files.edit_input import EditInput, InvalidImage
from server.image_files.file_types import read_file
from server.image_files.image_file import UnsuitableFile
from server.image_files.images import prepare
from server.image_files.jpeg_file import read_jpeg
from tests.server.image_files import (
    animation,
    chunk,
    file_of,
    many_chunks,
    opened,
    patterned,
    pixel_bomb,
    plain,
    png,
    scan_bomb,
    text_bomb,
)

MAX_PIXELS = 2048 * 2048
IMAGE = file_of(patterned())
PROFILE = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200)))


def prepared(*images: bytes, mask: bytes | None = None, size: tuple[int, int] | None = None) -> EditInput:
    return prepare(list(images), mask, size, MAX_PIXELS)


def source(file: bytes) -> Image.Image:
    """Return the image that an engine gets."""
    edit = prepared(file)
    [sent] = edit.source_images.files
    image = opened(sent)
    assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
    return image


def refusal(*images: bytes, mask: bytes | None = None) -> InvalidImage:
    with pytest.raises(InvalidImage) as caught:
        prepared(*images, mask=mask)
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_format(kind: str) -> None:
    image = source(file_of(plain(), kind))
    assert image.size == (96, 64)
    assert all(abs(is_ - was) < 8 for is_, was in zip(image.getpixel((50, 30)), (200, 30, 40), strict=True))  # type: ignore[arg-type]


def test_a_png_keeps_every_pixel() -> None:
    assert source(file_of(patterned())).tobytes() == patterned().tobytes()


@pytest.mark.parametrize(
    ("stored", "pixel"),
    [
        (file_of(plain(colour=77, mode="L")), (77, 77, 77)),
        (file_of(plain(colour=1, mode="1")), (255, 255, 255)),
        (file_of(plain().quantize(4)), (200, 30, 40)),
        (file_of(plain(colour=(255, 0, 0, 128), mode="RGBA")), (255, 127, 127)),
        (file_of(plain(colour=(255, 0, 0, 0), mode="RGBA")), (255, 255, 255)),
        (file_of(plain(colour=(255, 0, 0, 128), mode="RGBA"), "WEBP", lossless=True), (255, 127, 127)),
        (file_of(plain(colour=(0, 128), mode="LA")), (127, 127, 127)),
        (file_of(plain(colour=0, mode="P"), transparency=0), (255, 255, 255)),
        (file_of(plain(colour=9, mode="L"), transparency=9), (255, 255, 255)),
        (file_of(plain(), transparency=(200, 30, 40)), (255, 255, 255)),
        (file_of(plain(colour=40_000, mode="I;16")), (156, 156, 156)),
        (file_of(plain(colour=40_000, mode="I;16"), transparency=1), (156, 156, 156)),
        (png(96, 64, 16, 2, b"\x9c\x40\x10\x00\x00\xff" * 96), (156, 16, 0)),
        (png(96, 64, 16, 6, b"\xff\xff\x00\x00\x00\x00\x80\x00" * 96), (255, 127, 127)),
        (png(96, 64, 2, 0, b"\xaa" * 24), (170, 170, 170)),
        (file_of(plain(colour=(0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (254, 0, 0)),
        (file_of(plain(), "MPO", save_all=True, append_images=[plain(colour=(0, 0, 9))], quality=100), (200, 30, 40)),
    ],
    ids=range(17),
)
def test_every_mode_becomes_rgb(stored: bytes, pixel: tuple[int, int, int]) -> None:
    found = source(stored).getpixel((40, 20))
    assert isinstance(found, tuple)
    assert all(abs(is_ - wanted) <= 2 for is_, wanted in zip(found, pixel, strict=True)), found


STORED_AS = {
    1: None,
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("orientation", "turn"), STORED_AS.items())
def test_photos_are_turned_upright(orientation: int, turn: Transpose | None) -> None:
    stored = patterned() if turn is None else patterned().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(stored, "PNG", exif=exif)
    assert source(file).tobytes() == patterned().tobytes()
    assert prepared(file).size == (96, 64)
    assert source(file_of(stored, "JPEG", exif=exif)).size == (96, 64)
    assert source(file_of(stored, "WEBP", exif=exif)).size == (96, 64)


def test_invalid_exif_is_ignored() -> None:
    assert source(file_of(patterned(), exif=b"Exif\0\0MM\0*\0\0\xff\xff")).tobytes() == patterned().tobytes()


def test_metadata_is_removed() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    file = file_of(plain(), exif=exif, icc_profile=b"\0" * 200, dpi=(300, 300))
    assert b"taken at home" not in prepared(file).source_images.files[0]


@pytest.mark.parametrize(
    ("size", "edit"),
    [((96, 64), (96, 64)), ((100, 70), (96, 64)), ((95, 380), (96, 384)), ((64, 256), (64, 256))],
)
def test_the_default_size_is_the_first_image_s(size: tuple[int, int], edit: tuple[int, int]) -> None:
    found = prepared(file_of(plain(*size)), file_of(plain(200, 200)))
    assert found.size == edit == edit_size(*size)
    assert found.tokens == source_tokens(*size) + source_tokens(200, 200)
    assert [opened(file).size for file in found.source_images.files] == [size, (200, 200)]


def test_an_explicit_size_wins() -> None:
    assert prepared(file_of(plain()), size=(300, 100)).size == (300, 100)


def test_large_images_are_scaled_down() -> None:
    found = prepared(file_of(plain(3000, 1000), "JPEG"))
    assert opened(found.source_images.files[0]).size == (2048, 682)
    assert found.size == (2048, 672)
    small = prepare([file_of(plain(400, 300))], None, None, 128 * 96)
    assert opened(small.source_images.files[0]).size == (128, 96)
    assert small.size == (128, 96)
    odd = prepare([file_of(plain(400, 390))], None, None, 100 * 100)
    assert odd.size[0] * odd.size[1] <= 100 * 100


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + bytes(100),
        animation("GIF"),
        file_of(plain(), "BMP"),
        file_of(plain(), "TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\0\0\0\0WAVE" + bytes(100),
        b"\xff\xd8\xff" + bytes(1000),
        b"RIFF\0\0\0\0WEBPVP8 " + bytes(1000),
        bytes(1000),
    ],
    ids=range(11),
)
def test_files_that_are_not_images(file: bytes) -> None:
    assert refusal(file).param == "image"


def test_the_message_names_the_accepted_formats() -> None:
    assert "PNG, JPEG or WEBP" in refusal(file_of(plain(), "BMP")).message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("left", [0.1, 0.5, 0.9])
def test_truncated_files(kind: str, left: float) -> None:
    whole = file_of(patterned(), kind)
    assert f"the {kind} file is truncated" in refusal(whole[: int(left * len(whole))]).message


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations(kind: str) -> None:
    assert "animated" in refusal(animation(kind)).message


@pytest.mark.parametrize("size", [(63, 64), (1, 1), (64, 257), (1000, 249)])
def test_shapes_that_cannot_be_edited(size: tuple[int, int]) -> None:
    assert f"{size[0]}x{size[1]}" in refusal(file_of(plain(*size))).message


def test_the_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(request_images.MAX_PIXELS, "PNG", 96 * 64)
    assert prepared(file_of(plain(96, 64))).size == (96, 64)
    assert "96x65" in refusal(file_of(plain(96, 65))).message


def test_the_invalid_image_is_named() -> None:
    good = file_of(plain())
    assert refusal(good, good, good[:60]).message.startswith("Image 3 of 3")


def test_a_jpeg_with_too_many_scans() -> None:
    file = file_of(patterned(), "JPEG", progressive=True)
    scans = file[file.index(b"\xff\xda") : -2]
    assert "scans" in refusal(file[:-2] + scans * 30 + file[-2:]).message


def test_scans_of_a_large_jpeg() -> None:
    assert "95 scans, too many for 4096x4096 pixels" in refusal(scan_bomb(4096, 85)).message
    assert prepared(scan_bomb(256, 85)).size == (256, 256)


def jpeg_with(segments: bytes) -> bytes:
    """Return a JPEG with further segments after its start."""
    file = file_of(patterned(), "JPEG")
    return file[:2] + segments + file[2:]


def webp_with(chunks: bytes) -> bytes:
    """Return an extended WEBP with further chunks."""
    file = file_of(patterned(), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0") + chunks
    return file[:4] + struct.pack("<I", len(file) - 8) + file[8:]


@pytest.mark.parametrize(
    ("few", "many"),
    [
        (lambda n: many_chunks(b"tEXt", n), "more than 100000 chunks"),
        (lambda n: many_chunks(b"abCd", n), "more than 100000 chunks"),
        (lambda n: many_chunks(b"IDAT", n), "more than 100000 chunks"),
        (lambda n: jpeg_with(b"\xff\xfe\0\2" * n), "more than 100000 segments"),
        (lambda n: jpeg_with(b"\xff\xe1\0\x0aExif\0\0MM" * n), "more than 100000 segments"),
        (lambda n: webp_with(b"abcd\0\0\0\0" * n), "more than 100000 chunks"),
    ],
    ids=range(6),
)
def test_parts_that_take_long_to_parse(few: Callable[[int], bytes], many: str) -> None:
    prepared(few(1))
    prepared(few(10_000))
    assert many in refusal(few(100_000)).message


@given(data=st.binary(max_size=400), magic=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_any_structure_is_walked_to_an_end(data: bytes, magic: str) -> None:
    start = {"PNG": IMAGE[:33], "JPEG": b"\xff\xd8", "WEBP": b"RIFF\0\0\0\0WEBP"}[magic]
    with suppress(UnsuitableFile):
        read_file(start + data)


def test_scans_are_counted_only_where_a_decoder_sees_them() -> None:
    """Not in metadata, and not behind the image, where phones put a film."""
    noise = b"\xff\xda\xff\xd9" * 10_000
    comment = b"\xff\xfe" + struct.pack(">H", len(noise) + 2) + noise
    assert read_jpeg(jpeg_with(comment) + noise).scans == 1
    assert read_jpeg(file_of(patterned(), "JPEG", progressive=True)).scans == 10


def test_a_webp_declares_its_canvas_before_it_is_allocated() -> None:
    file = bytearray(webp_with(b""))
    assert file[12:16] == b"VP8X"
    file[24:30] = b"\xff\x3f\0" * 2
    assert "16384x16384" in refusal(bytes(file)).message


BOMBS = """
import resource, sys, time
from pathlib import Path
from server.image_files.images import prepare
from server.image_files.edit_input import InvalidImage
file = Path(sys.argv[1]).read_bytes()
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    prepare([file], None, None, 2048 * 2048)
    answer = "decoded"
except InvalidImage as error:
    answer = "refused"
print(answer, time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("bomb", ["PNG", "JPEG", "WEBP", "text"])
def test_decompression_bombs_cost_nothing(bomb: str, tmp_path: Path) -> None:
    """Runs in its own process, which reports its time and memory."""
    path = tmp_path / "bomb"
    path.write_bytes(text_bomb() if bomb == "text" else pixel_bomb(bomb))
    assert path.stat().st_size < 300_000
    command, root = [sys.executable, "-c", BOMBS, str(path)], Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    code, cpu_s, kilobytes = ran.stdout.split()
    assert code == ("decoded" if bomb == "text" else "refused")
    assert float(cpu_s) < 0.2
    assert int(kilobytes) < 50_000


class TestMasks:
    def mask(self, alpha: Image.Image) -> bytes:
        mask = plain(*alpha.size, colour=(0, 0, 0))
        mask.putalpha(alpha)
        return file_of(mask)

    def test_the_mask_keeps_parts_of_the_first_image(self) -> None:
        alpha = plain(colour=255, mode="L")
        alpha.paste(0, (0, 0, 48, 64))
        found = prepared(file_of(patterned()), file_of(plain()), mask=self.mask(alpha))
        assert found.source_images.overlay is not None
        overlay = opened(found.source_images.overlay)
        assert (overlay.mode, overlay.size) == ("RGBA", (96, 64))
        assert overlay.getchannel("A").tobytes() == alpha.tobytes()
        assert overlay.convert("RGB").tobytes() == patterned().tobytes()

    def test_the_mask_is_fitted_like_the_image(self) -> None:
        image, alpha = plain(200, 100, colour=(0, 0, 255)), plain(200, 100, colour=0, mode="L")
        image.paste((255, 0, 0), (100, 0, 200, 100))
        alpha.paste(255, (100, 0, 200, 100))
        found = prepare([file_of(image)], self.mask(alpha), (64, 64), MAX_PIXELS)
        assert found.source_images.overlay is not None
        overlay = opened(found.source_images.overlay)
        assert overlay.size == (64, 64)
        assert overlay.getpixel((10, 30)) == (0, 0, 255, 0)
        assert overlay.getpixel((54, 30)) == (255, 0, 0, 255)

    def test_one_transparent_colour_is_an_alpha_channel(self) -> None:
        found = prepared(file_of(plain()), mask=file_of(plain(colour=0, mode="P"), transparency=0))
        assert found.source_images.overlay is not None
        assert opened(found.source_images.overlay).getchannel("A").getextrema() == (0, 0)

    def test_the_mask_is_turned_upright_like_the_image(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        photo = file_of(patterned().transpose(Transpose.ROTATE_90), "JPEG", exif=exif)
        assert prepared(photo, mask=self.mask(plain(96, 64, colour=0, mode="L"))).size == (96, 64)
        assert "64x96" in refusal(photo, mask=self.mask(plain(64, 96, colour=0, mode="L"))).message

    @pytest.mark.parametrize(
        "mask",
        [
            file_of(plain()),
            file_of(plain(colour=(0, 0, 0, 0), mode="RGBA"), "WEBP"),
            file_of(plain(95, 64, colour=(0, 0, 0, 0), mode="RGBA")),
            file_of(plain(colour=(0, 0, 0, 0), mode="RGBA"))[:60],
            b"not an image",
            chunk(b"IHDR", b""),
        ],
        ids=range(6),
    )
    def test_invalid_masks(self, mask: bytes) -> None:
        error = refusal(file_of(plain()), mask=mask)
        assert error.param == "mask"
        assert error.message.startswith("The mask")
