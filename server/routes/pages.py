"""GET /: the playground, a client of the API. GET /docs: the API reference, Swagger UI with /openapi.json.

The pages need no key, load nothing from other servers, and are made once.
"""

import hashlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import resources
from pathlib import Path

import orjson
from fastapi import APIRouter, FastAPI, Request, Response

from server.errors import ApiError
from server.responses.pieces import PiecesResponse

FOLDER = Path(__file__).parents[1] / "playground"
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")  # of the package fastapi-swagger: Swagger UI as it is released

PIECE_BYTES = 64 * 1024  # a client that does not read costs about one

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob:",  # the API returns images as data, not as URLs
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}

# Swagger UI shows nothing with trusted types: it sets HTML that it has sanitised. Its style sheet has icons as data.
_REFERENCE_POLICY = {**_POLICY, "img-src": "'self' blob: data:"}
del _REFERENCE_POLICY["require-trusted-types-for"]

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # revalidated every time, so that all files are of one version
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str

    @cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


@cache
def _files() -> dict[str, _File]:
    files = {}
    for path in FOLDER.iterdir():
        if path.suffix in _MEDIA_TYPES:
            files[path.name] = _File(path.read_bytes(), _MEDIA_TYPES[path.suffix])
    for name in SWAGGER_UI:
        content = (resources.files("fastapi_swagger.resources") / name).read_bytes()
        files[name] = _File(content, _MEDIA_TYPES[Path(name).suffix])
    return files


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> _File:
    return _File(orjson.dumps(app.openapi()), "application/json")


@router.get("/")
async def playground(request: Request) -> Response:
    """Return the playground."""
    return _file_response(request, _file("index.html"))


@router.get("/docs")
async def reference(request: Request) -> Response:
    """Return the API reference."""
    return _file_response(request, _file("docs.html"), _REFERENCE_POLICY)


@router.get("/openapi.json")
async def openapi_document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return _file_response(request, _document(request.app))


@router.get("/playground/{name}")
async def page_file(name: str, request: Request) -> Response:
    """Return a style sheet, script or icon of the pages."""
    return _file_response(request, _file(name))


def _file(name: str) -> _File:
    if (file := _files().get(name)) is None:
        raise ApiError(404, "The playground has no file with this name.", code="not_found")
    return file


def _file_response(request: Request, file: _File, policy: Mapping[str, str] = _POLICY) -> Response:
    directives = "; ".join(f"{name} {value}" for name, value in policy.items())
    headers = {**_HEADERS, "content-security-policy": directives, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return PiecesResponse(_pieces(file.content), len(file.content), headers=headers, media_type=file.media_type)


async def _pieces(content: bytes) -> AsyncGenerator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]
