"""Who may use /v1: everybody, or whoever sends the one key of the settings."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.errors import ApiError

_bearer = HTTPBearer(auto_error=False, description="The key given to `--api-key`, where one is set.")


def require_key(request: Request, sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
    """A dependency that lets a request through only with the configured key, compared in constant time.

    Raises:
        ApiError: 401 without the key or with another one.
    """
    key = request.app.state.services.settings.api_key
    if key is None:
        return
    if sent is None:
        raise _unauthorized("An API key is needed: send it as Authorization: Bearer KEY.")
    if not hmac.compare_digest(sent.credentials.encode(), key.get_secret_value().encode()):
        raise _unauthorized("The API key is not valid here.")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
