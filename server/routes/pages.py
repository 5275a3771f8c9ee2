"""GET /: the playground, a page that uses the API as any client would. It is open to all; what it asks for is not.

GET /docs: the API reference, a page that shows what /openapi.json says. Neither needs anything from another server."""

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
    "img-src": "'self' blob:",  # pictures come as data of the API, not as addresses
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
    "cache-control": "no-cache",  # asked for again every time, so that the files of one version meet
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """The files of the pages by name: nothing else can be asked for."""
    files = {}
    for path in FOLDER.iterdir():
        if path.suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = _File(content, _MEDIA_TYPES[path.suffix], etag)
    return files


@router.get("/")
def page(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.get("/docs")
def reference(request: Request) -> Response:
    """The API reference."""
    return _answer(request, "reference.html")


@router.get("/playground/{name}")
def part(name: str, request: Request) -> Response:
    """What the pages consist of: style sheets, scripts, icon."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise ApiError(404, "The playground has no such file.", code="not_found")
    headers = {**_HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
