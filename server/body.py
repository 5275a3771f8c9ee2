"""Reading a JSON body within bounds: of size while it arrives, and of depth (orjson stops at 1024 levels)."""

import json
from typing import Any

import orjson
from fastapi import Request

from server.errors import ApiError, invalid


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 413 as soon as it exceeds `max_bytes`; 400 when it is declared or turns out to be something else.
        ClientDisconnect: the client left before all of it arrived.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid(None, f"The body must be JSON with Content-Type: application/json, not {kind[:100]}.")
    raw = await _read(request, max_bytes)
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


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body may have at most {max_bytes} bytes.", code="request_too_large")
