"""Reading bodies, limited in size as they arrive and in JSON's depth (orjson stops at 1024 levels)."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import orjson
from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.admission.memory_budget import Hold
from server.errors import ApiError, invalid
from server.requests.schemas import GenerationRequest, parse

LINGER_S = 2.0


@dataclass(frozen=True)
class ParsedBody:
    """Checked fields without images and mask, and those files, not decoded yet."""

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
    """Read the body as a JSON object. Raises as `read_generation`."""
    if body.media_type != "application/json":
        raise invalid(None, f"The body must be JSON with Content-Type: application/json, not {body.media_type[:100]}.")
    raw = bytearray()
    async for chunk in body.chunks():
        raw += chunk
    return _parse_json_object(raw)


def _parse_json_object(raw: bytearray) -> dict[str, Any]:
    try:
        parsed = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "surrogate" in error.msg and (param := _field_with_lone_surrogate(raw)):
            raise invalid(param, f"Invalid value for {param}: it contains a lone surrogate, not valid text.") from None
        raise invalid(None, f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if not isinstance(parsed, dict):
        raise invalid(None, 'The body must be a JSON object, for example {"prompt": "a red fox"}.')
    return parsed


def _field_with_lone_surrogate(raw: bytearray) -> str | None:
    """Return the first field with half of a surrogate pair, which `json` accepts and orjson does not."""
    try:
        for name, value in json.loads(raw).items():
            name.encode()
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return name
    except (ValueError, AttributeError, RecursionError):
        pass
    return None


class IncomingBody:
    """The body of a request as it arrives: at most `max_bytes`, counted in the memory budget.

    Args:
        held: is resized to the declared length, or to what has arrived of a body without one.
    """

    def __init__(self, request: Request, max_bytes: int, held: Hold) -> None:
        self._request, self._max_bytes, self._held = request, max_bytes, held
        self._is_complete = False
        self.headers = request.headers
        self.media_type = self.headers.get("content-type", "application/json").partition(";")[0].strip().lower()

    async def read(self, parse_body: Callable[[Self], Awaitable[ParsedBody]]) -> ParsedBody:
        """Return what `parse_body` makes of this body. An error sent before its end lingers."""
        try:
            return await parse_body(self)
        except ApiError as error:
            error.__traceback__ = None  # its frames hold what was read
            if self._is_complete:
                raise
            raise _EarlyRefusal(error) from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body piece by piece.

        Raises:
            ApiError: 413 as soon as it exceeds `max_bytes`; 429 or 503 if the budget has no room for it.
            ClientDisconnect: it is incomplete.
        """
        declared = _declared_length(self.headers)
        self._count(declared)
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > declared:
                self._count(received)
            yield chunk
        self._is_complete = True

    def _count(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(413, f"The body may have at most {self._max_bytes} bytes.", code="request_too_large")
        self._held.resize(size)


def _declared_length(headers: Headers) -> int:
    declared = headers.get("content-length", "")
    return int(declared) if re.fullmatch("[0-9]{1,18}", declared) else 0


class _EarlyRefusal(ApiError):
    """An error sent while the body is still arriving."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            error.status, error.message, type=error.type, code=error.code, param=error.param, headers=error.headers
        )

    def response(self) -> Response:
        response = super().response()
        return _LingeringResponse(response.body, self.status, self.headers, "application/json")


class _LingeringResponse(Response):
    """Reads and drops the rest of the body for up to `LINGER_S`.

    Closing the connection of a client that is still sending resets it. Most clients read only after sending: they would
    see a broken connection, and retry.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
