"""Logs: one line per event, `key=value`, to stderr. No prompts, no image data: events carry ids and sizes."""

import logging
import sys
import time
import traceback
from types import TracebackType
from typing import Any

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/+@%,*<>[]{}()")


def _value(value: Any) -> str:
    """A value on one line, quoted where it has spaces, so that a line can be split again."""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs `name key=value ...`; fields that are None are left out."""
    if logger.isEnabledFor(level):
        pairs = (f"{key}={_value(value)}" for key, value in fields.items() if value is not None)
        logger.log(level, "%s", " ".join((name, *pairs)))


def where(error: BaseException) -> str:
    """The frames of a traceback on one line, innermost first, without the error's text: that may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return "<".join(f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in reversed(frames))


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z info glimmer.api message`, exceptions on the same line."""

    converter = time.gmtime

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        error = ei[1]
        return "" if error is None else f"error={_value(repr(error))} where={_value(where(error))}"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " ")


def configure(level: str) -> None:
    """Sends all logging of this process to stderr in one format; the HTTP libraries only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
