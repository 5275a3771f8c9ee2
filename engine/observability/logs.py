"""Logs: one line per event, `key=value` or JSON, to stderr. No prompts, no image data: events carry ids and sizes.

The way of a request through the processes is in the lines with its id: the API's have it as `request`, and as `job` the
id of the job it is for; an engine's have both, which it finds in the job's record.
"""

import logging
import sys
import time
import traceback
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import orjson

from engine.config import LogFormat

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/+@%,*<>[]{}()")


def _value(value: Any) -> str:
    """A value on one line, quoted where it has spaces, so that a line can be split again."""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


_bound: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)


def bind(**fields: Any) -> None:
    """Adds fields to all further events of this task and of the tasks that it starts from now on."""
    _bound.set({**bound(), **fields})


def bound() -> dict[str, Any]:
    """The fields of `bind` that hold here."""
    return _bound.get() or {}


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs `name key=value ...`, the fields of `bind` among them; fields that are None are left out."""
    if logger.isEnabledFor(level):
        fields = {key: value for key, value in (bound() | fields).items() if value is not None}
        line = " ".join((name, *(f"{key}={_value(value)}" for key, value in fields.items())))
        logger.log(level, "%s", line, extra={"event": name, "fields": fields})


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
        return "" if error is None else f"error={type(error).__name__} where={_value(where(error))}"

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " ")


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-01-31T12:00:00.123Z", "level": "info", "logger": "glimmer.api", "event": name, key: value, ...}`.
    What is logged by others has a `message` in place of the event."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{seconds}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line["logger"] = record.name
        if hasattr(record, "fields"):
            line |= {"event": record.event, **record.fields}  # type: ignore[attr-defined]
        else:
            line["message"] = record.getMessage()
        if record.exc_info and (error := record.exc_info[1]):
            line |= {"error": type(error).__name__, "where": where(error)}
        return orjson.dumps(line, default=str).decode()


def configure(level: str, log_format: LogFormat = "text") -> None:
    """Sends all logging of this process to stderr in one format. Other people's libraries are heard from warnings up:
    what they say below that may quote what clients sent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else LineFormatter())
    least = getattr(logging, level.upper())
    logging.basicConfig(level=max(least, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("glimmer").setLevel(least)
