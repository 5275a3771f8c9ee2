"""What the answer says of quoted texts that the checkpoint does not draw whole."""

from engine.quotes import QuoteRule, quoted_strings

MAX_WARNINGS = 8


def text_warnings(prompt: str, quotes: QuoteRule, max_characters: int | None) -> list[str]:
    """Return a sentence for each quoted text of more than `max_characters`. None quotes the prompt: jobs keep them
    longer than it."""
    if max_characters is None:
        return []
    lengths = [len(text) for text in quoted_strings(prompt, quotes)]
    found = [
        f"quoted text {number} of {len(lengths)} has {length} characters; the model draws the first {max_characters}"
        for number, length in enumerate(lengths, 1)
        if length > max_characters
    ]
    more = len(found) - MAX_WARNINGS
    return found[:MAX_WARNINGS] + ([f"{more} more quoted texts are cut"] if more > 0 else [])
