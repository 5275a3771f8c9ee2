"""GET /: the playground, a client of the API. GET /docs: the API reference, from /openapi.json.

The pages need no key, and load nothing from other servers.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

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
    etag: str


@cache
def _files() -> dict[str, _File]:
    files = {}
    for path in FOLDER.iterdir():
        if path.suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = _File(content, _MEDIA_TYPES[path.suffix], etag)
    return files


@router.get("/")
def playground(request: Request) -> Response:
    """Return the playground."""
    return _file_response(request, "index.html")


@router.get("/docs")
def reference(request: Request) -> Response:
    """Return the API reference."""
    return _file_response(request, "reference.html")


@router.get("/playground/{name}")
def page_file(name: str, request: Request) -> Response:
    """Return a style sheet, script or icon of the pages."""
    return _file_response(request, name)


def _file_response(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise ApiError(404, "The playground has no file with this name.", code="not_found")
    headers = {**_HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
