"""GET /v1/files/{name}: images by URL. The URL cannot be guessed, so no key is required."""

from typing import get_args

from fastapi import APIRouter, Request, Response

from engine.jobs.job import OutputFormat
from server import openapi
from server.admission.keys import ANONYMOUS
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout
from server.responses.held_image import HeldImage
from server.responses.pieces import PiecesResponse
from server.services import ServicesDep

router = APIRouter(prefix="/v1/files", tags=["files"])

_FILE = {"schema": {"type": "string", "format": "binary"}}
_IMAGE: openapi.Responses = {
    200: {"description": "The image.", "content": {f"image/{name}": _FILE for name in get_args(OutputFormat)}}
}


@router.get("/{name}", response_class=Response, responses={**_IMAGE, **openapi.errors(404, 500, 503)})
async def retrieve_file(name: str, request: Request, services: ServicesDep) -> Response:
    """Return the image with this name, while its result is kept."""
    if not services.keys.open_to_all:
        request.state.places.enter_context(services.gate.request_of(ANONYMOUS.owner))
    token = name.partition(".")[0]
    media_type, size = await with_redis_timeout(services.queue.shared_file_info(token))
    if media_type is None:
        raise ApiError(404, "This image does not exist, or is no longer kept.", code="file_not_found", param="name")
    file = HeldImage(lambda: services.queue.shared_file(token), size, services.held_for(request))
    await file.load(patient=False)
    headers = {
        "cache-control": f"private, max-age={services.queue.result_ttl_s}, immutable",
        "x-content-type-options": "nosniff",
    }
    return PiecesResponse(file.pieces(), size, headers=headers, media_type=media_type)
