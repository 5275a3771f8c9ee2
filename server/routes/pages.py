"""GET /: the playground, a client of the API. GET /docs: the API reference, from /openapi.json.

The pages need no key, load nothing from other servers, and are made once.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import orjson
from fastapi import APIRouter, FastAPI, Request, Response

from server.errors import ApiError

FOLDER = Path(__file__).parents[1] / "playground"

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

_HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
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
    return _file_response(request, _file("reference.html"))


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


def _file_response(request: Request, file: _File) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
