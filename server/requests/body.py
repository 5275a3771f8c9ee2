"""Reading bodies, limited in size, JSON values and depth (orjson stops at 1024 levels).

So parsing takes time and memory in proportion to the bytes of a body, whatever it contains.
"""

import asyncio
import codecs
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import orjson
from fastapi import Request
from starlette.datastructures import Headers

from server.admission.memory_budget import RETRY_S, SMALL_BYTES, Hold
from server.errors import ApiError, invalid, unavailable
from server.requests.encodings import charset_of, check_uncompressed, to_utf8
from server.requests.schemas import MAX_NAME_CHARS, GenerationRequest, parse

COUNTED_BYTES = 2**20  # at once, after the first `SMALL_BYTES`
MAX_VALUES = 100_000  # a plan has 4352 tokens; prompt and negative prompt together 64,000 characters

_EXAMPLE = 'for example {"prompt": "a red fox"}'


@dataclass(frozen=True)
class ParsedBody:
    """Checked fields, and the undecoded files."""

    request: GenerationRequest
    images: list[bytes] = field(default_factory=list)
    mask: bytes | None = None


async def read_generation(body: "IncomingBody") -> ParsedBody:
    """Read the body of a generation.

    Raises:
        ApiError: 400 naming the invalid field, or as `IncomingBody.chunks`.
        ClientDisconnect: the body is incomplete.
    """
    return ParsedBody(parse(GenerationRequest, await read_json_object(body)))


async def read_json_object(body: "IncomingBody") -> dict[str, Any]:
    """Read a JSON object. Raises as `read_generation`."""
    if body.media_type != "application/json":
        raise invalid(None, f"The body must be JSON with Content-Type: application/json, not {body.media_type[:100]}.")
    raw = bytearray()
    async for chunk in body.chunks():
        raw += chunk
    return _parse_json_object(to_utf8(raw, charset_of(body.content_type)))


def load_json(text: bytes | bytearray, param: str | None = None) -> Any:
    """Parse the JSON of a body, or of the field `param`, with at most `MAX_VALUES` values.

    Raises:
        ApiError: 400 for more values, before they are made.
        orjson.JSONDecodeError: it is not JSON.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:  # also those in strings; no request has as many
        name = param or "The body"
        raise invalid(param, f"{name} has too many values: more than {MAX_VALUES} commas and opening brackets.")
    return orjson.loads(text)


def _parse_json_object(raw: bytes | bytearray) -> dict[str, Any]:
    raw = raw.removeprefix(codecs.BOM_UTF8)
    _check_encoding(raw)
    try:
        parsed = load_json(raw)
    except orjson.JSONDecodeError as error:
        if "surrogate" in error.msg and (param := _field_with_lone_surrogate(raw)):
            raise invalid(param, f"Invalid value for {param}: it contains a lone surrogate, not valid text.") from None
        _check_utf8(raw)
        raise invalid(None, f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if not isinstance(parsed, dict):
        raise invalid(None, f"The body must be a JSON object, {_EXAMPLE}.")
    return parsed


def _check_encoding(raw: bytes | bytearray) -> None:
    if not raw or raw.isspace():
        raise invalid(None, f"The body is empty; it must be a JSON object, {_EXAMPLE}.")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in raw[:4]:  # UTF-32 begins as UTF-16 does
        raise invalid(None, "The body must be JSON in UTF-8, not in UTF-16 or UTF-32.")


def _check_utf8(raw: bytes | bytearray) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise invalid(None, f"The body must be JSON in UTF-8; its byte {error.start} is not.") from None


def _field_with_lone_surrogate(raw: bytes | bytearray) -> str | None:
    """Return the first field with half of a surrogate pair, which `json` accepts."""
    try:
        for name, value in json.loads(raw).items():
            name.encode()
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return name[:MAX_NAME_CHARS]
    except (ValueError, AttributeError, RecursionError):
        pass
    return None


class IncomingBody:
    """A body as it arrives: at most `max_bytes`, counted in the memory budget.

    Args:
        held: is resized to what has arrived, in steps up to the declared length: what is declared costs nothing.
    """

    def __init__(self, request: Request, max_bytes: int, held: Hold) -> None:
        self._request, self._max_bytes, self._held = request, max_bytes, held
        self.content_type = request.headers.get("content-type", "application/json")
        self.media_type = self.content_type.partition(";")[0].strip().lower()

    async def read(self, parse_body: Callable[[Self], Awaitable[ParsedBody]]) -> ParsedBody:
        """Return the parsed body."""
        try:
            return await self._parse_or_give_way(parse_body)
        except ApiError as error:
            error.__traceback__ = None  # its frames hold what was read
            raise

    async def _parse_or_give_way(self, parse_body: Callable[[Self], Awaitable[ParsedBody]]) -> ParsedBody:
        limit = asyncio.timeout(None)
        try:
            async with limit:
                with self._held.arriving(lambda: limit.reschedule(0)):
                    return await parse_body(self)
        except TimeoutError:
            if not limit.expired():
                raise
            raise unavailable(
                "The body arrived slowly, and its memory is needed; try again shortly.", RETRY_S
            ) from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body piece by piece.

        Raises:
            ApiError: 413 as soon as it exceeds `max_bytes`; 429 or 503 without room in the budget; 400 if compressed.
            ClientDisconnect: it is incomplete.
        """
        headers = self._request.headers
        check_uncompressed(headers.getlist("content-encoding"))
        check_uncompressed(headers.getlist("transfer-encoding"), "Transfer-Encoding", plain="chunked")
        declared = _declared_length(headers)
        self._check(declared)
        counted = min(declared, SMALL_BYTES)
        self._held.resize(counted)
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > counted:
                self._check(received)
                counted = max(received, min(declared, received + COUNTED_BYTES))
                self._held.resize(counted)
            yield chunk
        self._held.arrived()

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(413, f"The body may have at most {self._max_bytes} bytes.", code="request_too_large")


def _declared_length(headers: Headers) -> int:
    declared = headers.get("content-length", "")
    return int(declared) if re.fullmatch("[0-9]{1,18}", declared) else 0
