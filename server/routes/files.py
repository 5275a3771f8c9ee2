"""GET /v1/files/{name}: pictures handed out by URL. Whoever knows the URL may have them, so no key is asked for."""

from typing import get_args

from fastapi import APIRouter, Response

from engine.jobs.job import OutputFormat
from server import openapi
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout
from server.services import ServicesDep

router = APIRouter(prefix="/v1/files", tags=["files"])

_FILE = {"schema": {"type": "string", "format": "binary"}}
_PICTURE: openapi.Responses = {
    200: {"description": "The picture.", "content": {f"image/{kind}": _FILE for kind in get_args(OutputFormat)}}
}


@router.get("/{name}", response_class=Response, responses={**_PICTURE, **openapi.errors(404, 500, 503)})
async def picture(name: str, services: ServicesDep) -> Response:
    """A picture by the name in its URL, while its result is kept."""
    found = await with_redis_timeout(services.queue.shared(name.partition(".")[0]))
    if found is None:
        raise ApiError(404, "There is no such picture, or not any more.", code="file_not_found", param="name")
    data, media_type = found
    headers = {
        "cache-control": f"private, max-age={services.queue.result_ttl_s}, immutable",
        "x-content-type-options": "nosniff",
    }
    return Response(data, headers=headers, media_type=media_type)
