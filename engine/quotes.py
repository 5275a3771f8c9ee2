"""Quoted strings of a prompt, to draw. No torch: the API imports this."""

import re
from collections.abc import Sequence
from typing import Literal

from engine.errors import RequestError

# The renderer gets strings in this order.
QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"\u300c([^\u300c\u300d]*)\u300d")

QuoteRule = Literal["reference", "strict"]
# An apostrophe beside a letter is none of a quotation. Scripts without spaces put quotations beside letters.
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_SINGLE = (
    rf"(?<!{_LETTER})'((?:[^']|(?<={_LETTER})'(?={_LETTER}))*+)'(?!{_LETTER})",
    rf"(?<!{_LETTER})\u2018((?:[^\u2018\u2019]|(?<={_LETTER})\u2019(?={_LETTER}))*+)\u2019(?!{_LETTER})",
)
_OTHERS = (  # German, French, Japanese, full width
    r"\u201e([^\u201c\u201d\u201e]*)[\u201c\u201d]",
    r"\u00ab([^\u00ab\u00bb]*)\u00bb",
    r"\u300e([^\u300e\u300f]*)\u300f",
    r"\uff02([^\uff02]*)\uff02",
)
_STRICT = re.compile("|".join((_SINGLE[0], *QUOTES[1:], _SINGLE[1], *_OTHERS)))

MAX_STRINGS = 1024
MAX_STRING_TOKENS = 2048  # with an end; the rest is cut, as in the reference
MAX_TOKENS = 8192  # of all strings


def quoted_strings(prompt: str, rule: QuoteRule = "reference") -> list[str]:
    """Return the quoted strings of a prompt.

    "reference" takes what the model was trained with: text between any two apostrophes, and quotations within others.
    "strict" takes neither, but quotation marks of more languages.
    """
    if rule == "reference":
        return [text for pattern in QUOTES for text in re.findall(pattern, prompt)]
    found = [match for match in _STRICT.finditer(prompt) if match.lastindex]
    return [match[kind] for kind in range(1, _STRICT.groups + 1) for match in found if match.lastindex == kind]


def glyph_tokens(strings: Sequence[str]) -> int:
    """Count bytes, an end for each string and, if their number is even, a pad."""
    pad = (len(strings) + 1) % 2
    return sum(min(len(text.encode()) + 1, MAX_STRING_TOKENS) + pad for text in strings)


def check_quoted_strings(field: str, prompt: str, rule: QuoteRule = "reference") -> None:
    """Raise RequestError for more quoted strings than can be rendered."""
    strings = quoted_strings(prompt, rule)
    if len(strings) > MAX_STRINGS:
        raise RequestError(
            f"{field} has {len(strings)} quoted strings; at most {MAX_STRINGS} can be rendered", param=field
        )
    tokens = glyph_tokens(strings)
    if tokens > MAX_TOKENS:
        raise RequestError(
            f"the quoted strings of {field} have {tokens} bytes, with one or two for the ends of each; at most "
            f"{MAX_TOKENS} can be rendered",
            param=field,
        )
