"""Every error leaves as `{"error": {"message", "type", "param", "code"}}`, also where the framework raised it.

ApiError
├── made by `invalid`          400  the request names something that cannot be served as asked
├── made by `invalid_image`    400  a picture that was sent cannot be used
└── made by `unavailable`      503  nothing wrong with the request; try again after `Retry-After`
"""

from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from engine.errors import QueueReadOnly, QueueUnavailable, RequestError

CLIENT_CLOSED_REQUEST = 499  # nginx's code: nobody is left to read it, but log and metrics show it

REDIS_RETRY_S = 2
ENGINE_RETRY_S = 5
DRAINING_RETRY_S = 2


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: written for the person who sent the request; names what would be accepted.
        type: `invalid_request_error` or another type of the HTTP contract.
        code, param: the error's code and the request field at fault, where there is one.
        headers: further response headers, for example `Retry-After`.
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
        """What goes into the envelope."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> Response:
        return Response(orjson.dumps({"error": self.detail}), self.status, self.headers, "application/json")


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: `param` cannot be served as asked."""
    return ApiError(400, message, param=param, code=code)


def invalid_image(param: str, message: str) -> ApiError:
    """400: the picture sent as `param` cannot be used."""
    return ApiError(400, message, type="image_generation_user_error", code="invalid_image_file", param=param)


def queue_unavailable() -> ApiError:
    """503 while Redis is away."""
    return unavailable("The job queue cannot be reached right now; try again shortly.", REDIS_RETRY_S)


def unavailable(message: str, retry_after_s: int) -> ApiError:
    """503: the same request will be served later, or by another replica now."""
    return ApiError(
        503, message, type="server_error", code="service_unavailable", headers={"retry-after": str(retry_after_s)}
    )


def internal_error() -> ApiError:
    """500 for a mistake of ours: says nothing of the inside."""
    return ApiError(500, "The server failed on this request.", type="server_error", code="internal_error")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return invalid(error.param, error.message, error.code).response()


async def _queue_unavailable(_: Request, error: Exception) -> Response:
    return queue_unavailable().response()


async def _queue_read_only(_: Request, error: Exception) -> Response:
    return unavailable("The job queue takes no jobs right now; try again shortly.", REDIS_RETRY_S).response()


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router raises: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        message = f"There is no route {request.method} {request.url.path}; /docs lists what there is."
    elif status == 405:
        accepted = _methods(request)
        headers["Allow"] = ", ".join(accepted)
        message = f"{request.url.path} does not accept {request.method}; it takes {' and '.join(accepted)}."
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return ApiError(status, message, code=code, headers=headers).response()


def _methods(request: Request) -> list[str]:
    """What can be done at this path. (The router's own word is the first route's alone.)"""
    routes = request.app.routes
    scopes = [{**request.scope, "method": method} for method in ("GET", "POST", "DELETE")]
    return [scope["method"] for scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes)]


_HANDLERS: dict[type[Exception], Any] = {
    ApiError: _api_error,
    RequestError: _request_error,
    QueueUnavailable: _queue_unavailable,
    QueueReadOnly: _queue_read_only,
    ClientDisconnect: _client_left,
    HTTPException: _http_error,
}


def install_handlers(app: FastAPI) -> None:
    """Gives `app` the error envelope. What is not handled here, `server.middleware` answers with `internal_error`."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
