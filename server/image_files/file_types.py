"""Telling a file's type by its first bytes, to say what was sent instead of an image."""

import re
from collections.abc import Callable

from server.image_files.image_file import ImageFile, NotAnImage
from server.image_files.jpeg_file import read_jpeg
from server.image_files.png_file import read_png
from server.image_files.webp_file import read_webp

_READERS: tuple[tuple[str, bytes, Callable[[bytes], ImageFile]], ...] = (
    ("PNG", rb"\x89PNG\r\n\x1a\n", read_png),
    ("JPEG", rb"\xff\xd8\xff", read_jpeg),
    ("WEBP", rb"RIFF.{4}WEBP", read_webp),
)
_MAGICS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_STRAY_BYTES = 512  # before an image that are looked behind

_OTHER_TYPES = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), name)
    for pattern, name in (
        (rb"GIF8[79]a", "a GIF file"),
        (rb"BM.{4}\0\0\0\0", "a BMP file"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "a TIFF file or a camera's raw file"),
        (rb"IIU\0|FUJIFILMCCD-RAW|.{4}ftypcrx ", "a camera's raw file"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 file"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL file"),
        (rb"II\xbc", "a JPEG XR file"),
        (rb".{4}ftypavi[fs]", "an AVIF file"),
        (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC (HEIF) file"),
        (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video"),
        (rb"RIFF.{4}WAVE|ID3|OggS|fLaC", "a sound file"),
        (rb"\0\0[\x01\x02]\0", "an icon (ICO) file"),
        (rb"8BPS", "a Photoshop (PSD) file"),
        (rb"v/1\x01", "an OpenEXR file"),
        (rb"#\?RADIANCE|#\?RGBE", "a Radiance (HDR) file"),
        (rb"DDS ", "a DDS file"),
        (rb"qoif", "a QOI file"),
        (rb"P[1-7]\s", "a netpbm (PPM) file"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
        (rb"\s*%PDF", "a PDF file"),
        (rb"PK\x03\x04", "a ZIP file"),
        (rb"\x1f\x8b", "a gzip file"),
        (rb"BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|\xfd7zXZ", "a compressed file"),
        (rb"version https://git-lfs", "a Git LFS pointer, not the file itself (`git lfs pull` fetches it)"),
        (rb"\s*data:", "the text of a data: URL"),
        (rb"\s*https?://", "the text of a URL; URLs are not fetched"),
        (rb"\s*(iVBORw0KGg|/9j/|UklGR|R0lGOD)", "base64 text"),
        (rb"\s*(89504e470d0a|ffd8ff|52494646)", "hexadecimal text"),
        (rb"b['\"](\\x89PNG|\\xff\\xd8|RIFF)", "the text of a Python bytes literal"),
        (rb"(\xc2\x89|\xef\xbf\xbd|\?)PNG|\x89PNG", "a PNG file that was changed on its way, as text"),
        (rb"(\xc3\xbf\xc3\x98\xc3\xbf|\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd)", "a file that was changed as text"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg", "an SVG file"),
        (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<body)", "an HTML page, perhaps an error page"),
        (rb"(\xef\xbb\xbf)?\s*<\?xml|(\xef\xbb\xbf)?\s*<", "XML, perhaps an error message"),
        (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON, perhaps an error message"),
    )
)  # fmt: skip


def read_file(data: bytes) -> ImageFile:
    """Read a file's structure; raise `UnsuitableFile` saying what it is or what is wrong with it."""
    for _, magic, read in _READERS:
        if re.match(magic, data, re.DOTALL):
            return read(data)
    raise NotAnImage(_what_else(data))


def _what_else(data: bytes) -> str:
    start = data[:_STRAY_BYTES]
    if not data:
        return "is an empty file (0 bytes)"
    if not start.strip(b"\0"):
        return "is not an image: the file starts with {len(start)} zero bytes"
    if len(data) < 12 and any(magic.startswith(data[: len(magic)]) for magic in _MAGICS):
        return f"is a truncated file of {len(data)} bytes"
    for pattern, name in _OTHER_TYPES:
        if pattern.match(start):
            return f"is {name}"
    for name, magic, _ in _READERS:
        if stray := re.search(magic, start, re.DOTALL):
            return f"starts with {stray.start()} bytes that do not belong to the {name} file behind them"
    try:
        start[:-4].decode()
        return "is text, not an image"
    except UnicodeDecodeError:
        return "is not an image, by its first bytes"
