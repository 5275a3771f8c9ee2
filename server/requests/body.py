"""Reading a body within bounds: of size while it arrives, and of JSON's depth (orjson stops at 1024 levels)."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, invalid

LINGER_S = 2.0


def media_type(request: Request) -> str:
    """The body's declared type without its parameters; JSON where none is declared."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 413 as soon as it exceeds `max_bytes`; 400 when it is declared or turns out to be something else.
        ClientDisconnect: the client left before all of it arrived.
    """
    kind = media_type(request)
    if kind != "application/json":
        raise invalid(None, f"The body must be JSON with Content-Type: application/json, not {kind[:100]}.")
    raw = b"".join([chunk async for chunk in read_chunks(request, max_bytes)])
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "surrogate" in error.msg and (param := _field_that_is_no_text(raw)):
            raise invalid(param, f"Invalid value for {param}: half of a surrogate pair is no text.") from None
        raise invalid(None, f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if not isinstance(body, dict):
        raise invalid(None, 'The body must be a JSON object, for example {"prompt": "a red fox"}.')
    return body


def _field_that_is_no_text(raw: bytes) -> str | None:
    """The first field with half of a surrogate pair in it, which JSON can write but nothing can encode. `json` lets it
    pass, orjson does not; None if they differ on something else."""
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
    """The body as it arrives.

    Raises:
        ApiError: 413 as soon as it is declared or found to exceed `max_bytes`.
        ClientDisconnect: the client left before all of it arrived.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(max_bytes)
    arrived = 0
    async for chunk in request.stream():
        arrived += len(chunk)
        if arrived > max_bytes:
            raise BodyTooLarge(max_bytes)
        yield chunk


class BodyTooLarge(ApiError):
    """413, answered while the body is still arriving."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(413, f"The body may have at most {max_bytes} bytes.", code="request_too_large")

    def response(self) -> Response:
        answer = super().response()
        return _Lingering(answer.body, self.status, self.headers, "application/json")


class _Lingering(Response):
    """An answer after which the rest of the request is read and dropped for a while.

    Closing the connection on a client that is still sending resets it, and most clients read nothing before they have
    sent everything: they would see a broken connection in place of the answer, and try again.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
