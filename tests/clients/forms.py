"""Multipart forms byte for byte as libraries without a Python or Node version write them."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

GUID = "3f0d3f6c-5a35-4f0c-8b43-0c0a8ff5d7a1"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_PLAIN = "".join(_TOKEN - set("*'%"))


@dataclass(frozen=True)
class Library:
    """How a library writes a form: its content type, and the headers of a text field and of a file."""

    boundary: str
    content_type: str
    text: Callable[[str], str]
    file: Callable[[str, str], str]


def form(library: Library, fields: dict[str, str], *files: tuple[str, str, bytes]) -> tuple[str, bytes]:
    """Return content type and body of a form; a file is name of the field, name of the file and content."""
    parts = [(library.file(name, filename), data) for name, filename, data in files]
    parts += [(library.text(name), value.encode()) for name, value in fields.items()]
    line = f"\r\n--{library.boundary}".encode()
    body = b"".join(line + b"\r\n" + head.encode() + b"\r\n\r\n" + data for head, data in parts) + line + b"--\r\n"
    return library.content_type, body.removeprefix(b"\r\n")


def _dotnet_value(value: str) -> str:
    """Encode what is not ASCII as in e-mail; quote what is no token, backslashes as they are."""
    if not value.isascii():
        return f'"=?utf-8?B?{base64.b64encode(value.encode()).decode()}?="'
    return value if set(value) <= _TOKEN else f'"{value}"'


def _dotnet_text(name: str) -> str:
    return f"Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name={_dotnet_value(name)}"


def _dotnet_file(name: str, filename: str) -> str:
    names = f"filename={_dotnet_value(filename)}; filename*=utf-8''{quote(filename, safe=_PLAIN)}"
    return f"Content-Disposition: form-data; name={_dotnet_value(name)}; {names}"


def _go_value(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _go_text(name: str) -> str:
    return f'Content-Disposition: form-data; name="{_go_value(name)}"'


def _go_file(name: str, filename: str) -> str:
    return f'{_go_text(name)}; filename="{_go_value(filename)}"\r\nContent-Type: application/octet-stream'


DOTNET = Library(GUID, f'multipart/form-data; boundary="{GUID}"', _dotnet_text, _dotnet_file)
"""MultipartFormDataContent of .NET's HttpClient, with StringContent and ByteArrayContent."""

GO = Library(60 * "7", f"multipart/form-data; boundary={60 * '7'}", _go_text, _go_file)
"""mime/multipart of Go: WriteField and CreateFormFile."""
