"""One line per event: ids and sizes, never prompts or images."""

import json
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
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


_bound: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)


def bind(**fields: Any) -> None:
    """Add fields to events of this task and its children."""
    _bound.set({**bound(), **fields})


def bound() -> dict[str, Any]:
    """Return this task's bound fields."""
    return _bound.get() or {}


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log `name key=value ...` with the bound fields; omit None."""
    if logger.isEnabledFor(level):
        fields = {key: value for key, value in (bound() | fields).items() if value is not None}
        line = " ".join((name, *(f"{key}={_value(value)}" for key, value in fields.items())))
        logger.log(level, "%s", line, extra={"event": name, "fields": fields})


def where(error: BaseException) -> str:
    """Return the traceback on one line, innermost frame first, without the error's text."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return "<".join(f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in reversed(frames))


class LineFormatter(logging.Formatter):
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
    """`time`, `level`, `logger` and the event's fields or a `message`."""

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
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # a large number, or a path that is not UTF-8
            return json.dumps(line, default=str)


def configure(level: str, log_format: LogFormat = "text") -> None:
    """Log to stderr; libraries only from warnings up: others may quote requests."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else LineFormatter())
    minimum = getattr(logging, level.upper())
    logging.basicConfig(level=max(minimum, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("glimmer").setLevel(minimum)
