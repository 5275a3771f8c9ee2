"""Requests that are to cost a server more than their sender: bodies, image files and heads of up to 8 MB."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.server.image_files import many_chunks, pixel_bomb, scan_bomb, text_bomb

SIZE, GENERATION_SIZE = 8_000_000, 2_000_000
GENERATIONS, EDITS = b"/v1/images/generations", b"/v1/images/edits"
SCANS = 100


@dataclass(frozen=True)
class HostileRequest:
    """A request without a key.

    Args:
        head: request line and headers, each with its line end, without the last empty line.
    """

    name: str
    head: bytes
    body: bytes = b""


def hostile_requests() -> list[HostileRequest]:
    """Return one of each shape."""
    return [*_json(), *_forms(), *_images(), *_heads()]


def _posted(name: str, path: bytes, content_type: bytes, body: bytes) -> HostileRequest:
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\nContent-Length: %d\r\n" % (
        path,
        content_type,
        len(body),
    )
    return HostileRequest(name, head, body)


def _filled(unit: bytes, separator: bytes = b"", size: int = SIZE) -> bytes:
    return separator.join([unit] * ((size - 1000) // (len(unit) + len(separator))))


def _json() -> list[HostileRequest]:
    return [
        _posted(f"JSON, {name}", path, b"application/json", b'{"prompt":"x",' + field + b"}")
        for path, size in ((GENERATIONS, GENERATION_SIZE), (EDITS, SIZE))
        for name, field in _json_fields(partial(_filled, size=size), size).items()
    ]


def _json_fields(filled: Callable[..., bytes], size: int) -> dict[str, bytes]:
    return {
        "list of images": b'"images":[%b]' % filled(b"1", b","),
        "unknown fields": b",".join(b'"%x":1' % number for number in range(size // 12)),
        "long name": b'"%b":1' % filled(b"ab"),
        "objects without effect": rb'"negative_prompt":"\ud800","extra_headers":{"a":[%b]}' % filled(b"{}", b","),
        "nested lists": b'"user":[%b]' % filled(b"[" * 900 + b"]" * 900, b","),
        "long number": b'"seed":%b' % filled(b"1"),
        "escapes": rb'"user":"%b"' % filled(rb"\u0041"),
        "tokens": b'"plan":{"rows":1,"cols":1,"tokens":[%b]}' % filled(b"1", b","),
        "blanks": b'"seed":%b1' % filled(b" "),
    }


def _part(name: bytes, data: bytes, more: bytes = b"") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name, more, data)


def _form(name: str, *parts: bytes) -> HostileRequest:
    fields = _part(b"prompt", b"x") + _part(b"size", b"64x64") + _part(b"num_inference_steps", b"1")
    return _posted(name, EDITS, b"multipart/form-data; boundary=B", fields + b"".join(parts) + b"--B--\r\n")


def _forms() -> list[HostileRequest]:
    return [
        _form("form, many parts", _filled(_part(b"plan[tokens][]", b"1"))),
        _form("form, long parameters", _filled(_part(b"plan[tokens][]", b"1", b";" * 3900))),
        _form("form, blanks after a boundary", _part(b"user", b"x")[:-2], b"\r\n--B", _filled(b" ")),
        _form("form, line ends", _part(b"user", _filled(b"\r\n--"))),
    ]


def _images() -> list[HostileRequest]:
    files = {
        "PNG of empty chunks": many_chunks(b"zzZz", 330_000),
        "PNG of text": text_bomb()[:-20],  # without its end, or it would be served
        "PNG of many pixels": pixel_bomb("PNG"),
        "JPEG of scans": scan_bomb(1024, SCANS),
        "JPEG of many pixels": pixel_bomb("JPEG"),
    }
    return [_form(name, _part(b"image", file, b'; filename="a"')) for name, file in files.items()]


def _heads() -> list[HostileRequest]:
    first = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
    chunked = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    return [
        HostileRequest("head, many headers", first + _filled(b"a: b\r\n")),
        HostileRequest("head, long header", first + b"a: " + _filled(b"b") + b"\r\n"),
        HostileRequest("head, long URL", b"GET /" + _filled(b"a") + b" HTTP/1.1\r\nHost: x\r\n"),
        HostileRequest("head, chunk extensions", chunked % GENERATIONS, b"1;" + _filled(b"a") + b"\r\n{\r\n"),
        HostileRequest("head, small chunks", chunked % GENERATIONS, _filled(b"1\r\n \r\n") + b"0\r\n\r\n"),
    ]
