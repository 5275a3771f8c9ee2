"""Reading bodies, limited in size as they arrive and in JSON's depth (orjson stops at 1024 levels)."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, invalid
from server.requests.schemas import GenerationRequest, parse

LINGER_S = 2.0


@dataclass(frozen=True)
class ParsedBody:
    """Checked fields without images and mask, and those files, not decoded yet."""

    request: GenerationRequest
    images: list[bytes] = field(default_factory=list)
    mask: bytes | None = None


async def read_generation(request: Request, max_bytes: int) -> ParsedBody:
    """Read the body of a generation.

    Raises:
        ApiError: 413 as soon as the body exceeds `max_bytes`; 400 naming the invalid field.
        ClientDisconnect: the body is incomplete.
    """
    return ParsedBody(parse(GenerationRequest, await read_json_object(request, max_bytes)))


def media_type(request: Request) -> str:
    """Return the declared media type, JSON by default."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read the body as a JSON object. Raises as `read_generation`."""
    declared_type = media_type(request)
    if declared_type != "application/json":
        raise invalid(None, f"The body must be JSON with Content-Type: application/json, not {declared_type[:100]}.")
    raw = b"".join([chunk async for chunk in read_chunks(request, max_bytes)])
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "surrogate" in error.msg and (param := _field_with_lone_surrogate(raw)):
            raise invalid(param, f"Invalid value for {param}: it contains a lone surrogate, not valid text.") from None
        raise invalid(None, f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if not isinstance(body, dict):
        raise invalid(None, 'The body must be a JSON object, for example {"prompt": "a red fox"}.')
    return body


def _field_with_lone_surrogate(raw: bytes) -> str | None:
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


async def read_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body as it arrives. Raises as `read_generation`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(max_bytes)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise BodyTooLarge(max_bytes)
        yield chunk


class BodyTooLarge(ApiError):
    """413, sent while the body is still arriving."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(413, f"The body may have at most {max_bytes} bytes.", code="request_too_large")

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
