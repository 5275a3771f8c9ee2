from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.admission.keys import ANONYMOUS, KeyRing
from server.errors import ApiError

_bearer = HTTPBearer(auto_error=False, description="A key of `--api-key` or `--api-keys`, if either is set.")


async def require_key(request: Request, sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
    """Set `request.state.caller`; raise a 401 without a known key."""
    keys: KeyRing = request.app.state.services.keys
    if keys.open_to_all:
        request.state.caller = ANONYMOUS
        return
    if sent is None:
        raise _unauthorized("An API key is required: send it as Authorization: Bearer KEY.")
    caller = keys.find(sent.credentials)
    if caller is None:
        raise _unauthorized("The API key is not valid here.")
    request.state.places.enter_context(request.app.state.gate.request_of(caller.owner))
    request.state.caller = caller


def has_key(request: Request, keys: KeyRing) -> bool:
    """Return whether the request carries a known key."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and keys.find(key.strip()) is not None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
