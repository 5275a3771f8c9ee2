import re

# The renderer gets strings in this order.
QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"\u300c([^\u300c\u300d]*)\u300d")


def quoted_strings(prompt: str) -> list[str]:
    """Return the quoted strings of a prompt: the text to draw."""
    return [text for pattern in QUOTES for text in re.findall(pattern, prompt)]
