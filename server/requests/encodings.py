"""What headers say of the bytes of a body or a part: compression and character encoding.

Each is honoured or refused by its name: ignored, it would change what the body means.
"""

import re
from collections.abc import Iterable

from server.errors import invalid

_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s"';]{1,40})""", re.IGNORECASE)
_UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")
# Python reads these in one pass. Left out are those in which ASCII bytes mean something else (UTF-16, UTF-7, EBCDIC),
# and codecs that take quadratic time (IDNA).
_READABLE = re.compile(
    r"iso-?8859-?([1-9]|1[0-35])|latin-?1|(windows-|cp)125[0-8]|koi8-[ru]"
    r"|gb(18030|k|2312)|big5|shift[-_]jis|euc-(jp|kr)"
)


def charset_of(content_type: str, default: str = "utf-8") -> str:
    """Return the encoding that a Content-Type names."""
    match = _CHARSET.search(content_type)
    return match[1].lower() if match else default


def to_utf8(data: bytes | bytearray, charset: str, param: str | None = None) -> bytes | bytearray:
    """Return text in UTF-8; text in UTF-8 is not checked.

    Raises:
        ApiError: 400 for another encoding than `_READABLE`, or bytes that it has not.
    """
    if charset in _UTF_8:
        return data
    name = param or "The body"
    if not _READABLE.fullmatch(charset):
        raise invalid(param, f"{name} is in {charset}, as its Content-Type says, which is not supported; send UTF-8.")
    try:
        return data.decode(charset).encode()
    except UnicodeDecodeError as error:
        raise invalid(
            param, f"{name} is not valid {charset}, which its Content-Type names (byte {error.start})."
        ) from None


def check_uncompressed(codings: Iterable[str], header: str = "Content-Encoding", plain: str = "identity") -> None:
    """Raise a 400 naming the header if a body is compressed.

    Args:
        codings: the header's values.
        plain: a coding that changes nothing.
    """
    for coding in ",".join(codings).split(","):
        if coding.strip().lower() not in ("", "identity", plain):
            raise invalid(header, f"{header} {coding.strip()[:40]} is not supported: send the body uncompressed.")
