"""Which parts of a prompt are to be lettered: its quoted strings."""

import re

# The order matters: the renderer gets the strings in it.
QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"\u300c([^\u300c\u300d]*)\u300d")


def quoted_strings(prompt: str) -> list[str]:
    """The texts to be lettered: all single-quoted strings, then curly, double and corner-bracketed ones."""
    return [text for pattern in QUOTES for text in re.findall(pattern, prompt)]
