"""Errors of requests that do not reach the app."""

import logging
import uuid
from collections.abc import Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from engine.observability.logs import event
from server.errors import ApiError
from server.processes.http_limits import MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES

logger = logging.getLogger("glimmer.http")


class Refused(Exception):
    """Stops the parser; without an error, the connection is closed silently."""

    def __init__(self, error: ApiError | None) -> None:
        super().__init__()
        self.error = error


def malformed(message: str = "The request is not valid HTTP.") -> ApiError:
    return ApiError(400, message, code="invalid_http")


def head_too_large() -> ApiError:
    message = f"The headers may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} lines at most, trailers included."
    return ApiError(431, message, code="headers_too_large")


def url_too_long() -> ApiError:
    return ApiError(414, f"The URL may have {MAX_URL_BYTES} bytes at most.", code="url_too_long")


def timed_out(part: str) -> ApiError:
    return ApiError(408, f"The {part} of the request arrived too slowly.", code="request_timeout")


def error_response(error: ApiError, default_headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the last response of a connection, and log it."""
    request_id = f"req_{uuid.uuid4().hex}"
    event(logger, "refused", request=request_id, status=error.status, code=error.code)
    response = error.response()
    headers = [
        *default_headers,
        *response.raw_headers,
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    return b"".join([STATUS_LINE[error.status], lines, b"\r\n", bytes(response.body)])
