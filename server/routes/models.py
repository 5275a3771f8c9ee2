"""GET /v1/models: the served model names."""

from typing import Any

from fastapi import APIRouter, Depends

from server.admission.auth import require_key
from server.requests.validation import model_not_found
from server.responses.schemas import ErrorBody
from server.services import ServicesDep

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_key)])


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "glimmer"}


@router.get("", responses={401: {"model": ErrorBody}})
async def list_models(services: ServicesDep) -> dict[str, Any]:
    """List the served names, the default first."""
    return {"object": "list", "data": [_model(name, services.started_at) for name in services.settings.model_names]}


@router.get("/{model:path}", responses={401: {"model": ErrorBody}, 404: {"model": ErrorBody}})
async def retrieve_model(model: str, services: ServicesDep) -> dict[str, Any]:
    """Describe one served name, which may contain slashes."""
    if model not in services.settings.model_names:
        raise model_not_found(services.settings.model_names)
    return _model(model, services.started_at)
