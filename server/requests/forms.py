"""Reading a multipart form as it arrives.

Parts are bounded before they are kept: number, headers, text. Only files may be as large as the body.
"""

import io
import re
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from server.errors import ApiError, invalid
from server.requests.encodings import charset_of, check_uncompressed, to_utf8
from server.requests.schemas import MAX_NAME_CHARS

MAX_PARTS = 10_000  # the official SDK sends a plan as one part per token, up to 4352
MAX_TEXT_BYTES = 2**20  # a prompt has at most 128,000 bytes, a plan as JSON about 100,000
MAX_HEADER_BYTES = 8192  # of one part
MAX_SEMICOLONS = 64  # of a Content-Disposition: 4 kB take 2 ms to split
MAX_PADDING = 100  # blanks after a boundary
MAX_CONTENT_TYPE_CHARS = 1000

_PADDING = re.compile(rb"[ \t]{%d}" % MAX_PADDING)

_PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")


class Part:
    """A field or a file of a form."""

    def __init__(self, name: str, *, is_file: bool, charset: str, max_bytes: int | None) -> None:
        self.name, self.is_file, self._charset = name, is_file, charset
        self._max_bytes, self._data = max_bytes, io.BytesIO()

    def write(self, data: memoryview) -> None:
        if self._max_bytes is not None and self._data.tell() + len(data) > self._max_bytes:
            raise invalid(self.name, f"Invalid value for {self.name}: it takes at most {self._max_bytes} bytes.")
        self._data.write(data)

    @property
    def data(self) -> bytes:
        """Return the content, without a copy."""
        return self._data.getvalue()

    def text(self, form_charset: str) -> str:
        """Return the content of a field, in its part's encoding or that of the form."""
        if self.is_file:
            raise invalid(self.name, f"{self.name} must be sent as text, without a file name.")
        data = to_utf8(self.data, self._charset or form_charset, self.name)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise invalid(self.name, f"Invalid value for {self.name}: it is not valid UTF-8.") from None


async def read_parts(content_type: str, chunks: AsyncIterator[bytes], large: re.Pattern[str]) -> list[Part]:
    """Return the parts of a form.

    Args:
        large: names of parts that may exceed `MAX_TEXT_BYTES`.

    Raises:
        ApiError: 400 naming the mistake.
    """
    try:
        return await _FormReader(content_type, large).read(chunks)
    except FormParserError:
        raise _invalid_form("it cannot be parsed") from None


class _FormReader:
    """Collects the parts of a form. The methods are the parser's callbacks."""

    def __init__(self, content_type: str, large: re.Pattern[str]) -> None:
        boundary = parse_options_header(content_type[:MAX_CONTENT_TYPE_CHARS])[1].get(b"boundary")
        if not boundary:
            raise _invalid_form("its Content-Type does not name a boundary")
        self._callbacks: dict[str, Any] = {}
        self._parser = MultipartParser(boundary, self._callbacks)  # type: ignore[arg-type]
        # The parser knows no preamble (RFC 2046): let it read one as a part that nothing collects.
        self._parser.write(b"--%b\r\n\r\n\r\n" % boundary)
        names = ("part_begin", "part_data", "header_field", "header_value", "header_end", "headers_finished", "end")
        self._callbacks.update({f"on_{name}": getattr(self, f"_{name}") for name in names})
        self._large, self._delimiter, self._delimiters = large, b"\r\n--" + boundary, 0
        self._padded_delimiter = re.compile(re.escape(self._delimiter) + _PADDING.pattern)
        self._parts: list[Part] = []
        self._part: Part | None = None
        self._header, self._value, self._header_bytes = bytearray(), bytearray(), 0
        self._headers: dict[bytes, bytes] = {}
        self._is_begun = self._is_complete = False

    async def read(self, chunks: AsyncIterator[bytes]) -> list[Part]:
        try:
            async for chunk in chunks:
                self._is_begun = self._is_begun or bool(chunk)
                self._check(chunk)
                self._parser.write(chunk)
        finally:
            self._callbacks.clear()  # a cycle would keep the files
        if not self._is_complete:
            raise _invalid_form("it ends before its last boundary" if self._is_begun else "it is empty")
        return self._parts

    def _check(self, chunk: bytes) -> None:
        """Refuse many delimiters and blanks, which the parser reads byte by byte: 150 ms per megabyte."""
        delimiters = chunk.count(self._delimiter)
        self._delimiters += delimiters  # also those in a file that end no part
        if self._delimiters > 2 * MAX_PARTS:
            raise _too_many_parts()
        starts_in_padding = self._parser.state == MultipartState.BOUNDARY_PADDING
        if (starts_in_padding and _PADDING.match(chunk)) or (delimiters and self._padded_delimiter.search(chunk)):
            raise _invalid_form(f"a boundary is followed by {MAX_PADDING} blanks or more")

    def _part_begin(self) -> None:
        if len(self._parts) == MAX_PARTS:
            raise _too_many_parts()
        self._part, self._headers, self._header_bytes = None, {}, 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _invalid_form(f"the headers of one of its parts have more than {MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        if disposition.count(b";") > MAX_SEMICOLONS:
            raise _invalid_form(f"a Content-Disposition has more than {MAX_SEMICOLONS} semicolons")
        options = parse_options_header(disposition)[1]
        if b"name" not in options:
            raise _invalid_form("one of its parts has no name")
        name = options[b"name"].decode(errors="replace")[:MAX_NAME_CHARS]
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN_ENCODINGS:
            raise invalid(name, f"{name}: Content-Transfer-Encoding is not supported; send the bytes as they are.")
        check_uncompressed([self._headers.get(b"content-encoding", b"").decode(errors="replace")])
        content_type = self._headers.get(b"content-type", b"").decode(errors="replace")
        self._part = Part(
            name,
            is_file=b"filename" in options,
            charset=charset_of(content_type, default=""),
            max_bytes=None if self._large.fullmatch(name) else MAX_TEXT_BYTES,
        )
        self._parts.append(self._part)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._part.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._is_complete = True


def _too_many_parts() -> ApiError:
    return _invalid_form(f"it has more than {MAX_PARTS} parts")


def _invalid_form(reason: str) -> ApiError:
    return invalid(None, f"The body is not a valid multipart form: {reason}.")
