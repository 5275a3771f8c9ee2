"""Error responses, all with the body `{"error": {"message", "type", "param", "code"}}`."""

from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from engine.errors import QueueReadOnly, QueueUnavailable, RequestError, UnreadableJob

CLIENT_CLOSED_REQUEST = 499  # nginx's code, for logs and metrics

REDIS_RETRY_S = 2
ENGINE_RETRY_S = 5
DRAINING_RETRY_S = 2
BUSY_RETRY_S = 2


class ApiError(Exception):
    """An error response.

    Args:
        message: says what would be accepted.
        type: one of OpenAI's.
        param: the invalid field.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers = headers or {}

    @property
    def detail(self) -> dict[str, Any]:
        """Return the value of `error` in the body."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        return Response(orjson.dumps({"error": self.detail}), self.status, self.headers, "application/json")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return a 400 for the field `param`."""
    return ApiError(400, message, param=param, code=code)


def invalid_image(param: str, message: str) -> ApiError:
    """Return a 400 for an uploaded image."""
    return ApiError(400, message, type="image_generation_user_error", code="invalid_image_file", param=param)


def queue_unavailable() -> ApiError:
    """Return the 503 for an outage of Redis."""
    return unavailable("The job queue cannot be reached right now; try again shortly.", REDIS_RETRY_S)


def too_many(
    message: str, retry_after_s: int, *, param: str | None = None, headers: dict[str, str] | None = None
) -> ApiError:
    """Return a 429: a limit is reached for now."""
    return ApiError(
        429,
        message,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        param=param,
        headers={**(headers or {}), "retry-after": str(retry_after_s)},
    )


def unavailable(message: str, retry_after_s: int) -> ApiError:
    """Return a 503: the request may succeed later, or on another replica."""
    return ApiError(
        503, message, type="server_error", code="service_unavailable", headers={"retry-after": str(retry_after_s)}
    )


def internal_error() -> ApiError:
    """Return the 500 for a bug in the server, without details."""
    return ApiError(500, "The server failed to process this request.", type="server_error", code="internal_error")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return invalid(error.param, error.message, error.code).response()


async def _queue_unavailable(_: Request, error: Exception) -> Response:
    return queue_unavailable().response()


async def _queue_read_only(_: Request, error: Exception) -> Response:
    return unavailable("The job queue does not accept jobs right now; try again shortly.", REDIS_RETRY_S).response()


async def _unreadable_job(_: Request, error: Exception) -> Response:
    message = "What is stored of this job is damaged."
    return ApiError(500, message, type="server_error", code="job_unreadable").response()


async def _client_disconnected(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        message = f"There is no route {request.method} {request.url.path}; /docs lists the routes."
    elif status == 405:
        methods = _allowed_methods(request)
        headers["Allow"] = ", ".join(methods).replace("GET", "GET, HEAD")  # the middleware serves HEAD
        message = f"{request.url.path} does not accept {request.method}; it accepts {' and '.join(methods)}."
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return ApiError(status, message, code=code, headers=headers).response()


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes at this path; the router names only the first's."""
    routes = request.app.routes
    scopes = [{**request.scope, "method": method} for method in ("GET", "POST", "DELETE")]
    return [scope["method"] for scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes)]


_HANDLERS: dict[type[Exception], Any] = {
    ApiError: _api_error,
    RequestError: _request_error,
    QueueUnavailable: _queue_unavailable,
    QueueReadOnly: _queue_read_only,
    UnreadableJob: _unreadable_job,
    ClientDisconnect: _client_disconnected,
    HTTPException: _http_error,
}


def install_handlers(app: FastAPI) -> None:
    """Install the handlers; `server.middleware` handles all other exceptions."""
    for error_type, handler in _HANDLERS.items():
        app.add_exception_handler(error_type, handler)
