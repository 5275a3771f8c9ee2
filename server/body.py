"""Reading a JSON body within bounds: of size while it arrives, and of depth (orjson stops at 1024 levels)."""

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
    try:
        body = orjson.loads(await _read(request, max_bytes))
    except orjson.JSONDecodeError as error:
        raise invalid(None, f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if not isinstance(body, dict):
        raise invalid(None, 'The body must be a JSON object, for example {"prompt": "a red fox"}.')
    return body


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
