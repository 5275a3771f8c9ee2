"""Keep web pages from using a server without keys through a visitor's browser."""

import re
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.metrics import Metrics
from server.settings import ServerSettings

# Nobody can register names there and point them at this server.
_PRIVATE_DOMAINS = ("localhost", "local", "internal", "test", "home.arpa", "svc")
_HOST = re.compile(r"(\[[0-9a-f:.]+(?:%[\w.~-]+)?\]|[\w.-]+)(?::\d*)?", re.ASCII | re.IGNORECASE)
_UNGUESSABLE = "/v1/files/"  # its URLs are secret, and made to be embedded in pages


class WebPageGuard:
    """Answers 403 to browsers where a page could do harm; other clients send no `Origin`.

    - DNS rebinding: a page gives its own name the address of this server, and is then of the same origin. So `Host`
      must be an address, or a name that no page can claim.
    - Requests of pages elsewhere, which need no permission by CORS: refused for /v1, unless `cors_origins` has their
      origin.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = _known_hosts(settings)
        self._origins = set(settings.allowed_origins)
        if settings.public_url is not None:
            self._origins.add(_origin_of(settings.public_url))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["method"] != "OPTIONS" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        reason, error = refusal
        self._metrics.refused.labels(reason).inc()
        await error.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[str, ApiError] | None:
        headers, path = Headers(scope=scope), scope["path"]
        if path == "/live":
            return None
        for host in headers.getlist("host"):
            if not self._is_known(host):
                return "host", _forbidden(
                    "host_not_allowed",
                    f"This server needs no key, so it answers under addresses and local names only, not as "
                    f"{host[:100]}. Add the name to GLIMMER_ALLOWED_HOSTS, or set an API key.",
                )
        if path.startswith("/v1/") and not path.startswith(_UNGUESSABLE) and self._is_cross_site(headers):
            return "cross_site", _forbidden(
                "origin_not_allowed",
                "This server takes no requests from pages of other sites. Add the page's origin to "
                "GLIMMER_CORS_ORIGINS to allow them.",
            )
        return None

    def _is_known(self, host: str) -> bool:
        match = _HOST.fullmatch(host.strip())
        name = match[1].strip("[]").rstrip(".").lower() if match else ""
        if not host or "*" in self._hosts or name in self._hosts:
            return True
        parents = (name[index + 1 :] for index, letter in enumerate(name) if letter == ".")
        if any(f"*.{parent}" in self._hosts for parent in parents):
            return True
        return bool(name) and _cannot_be_claimed(name)

    def _is_cross_site(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if "*" in self._origins or origin in self._origins or site == "same-origin":
            return False
        if site in ("cross-site", "same-site"):
            return True
        host = headers.get("host", "")
        return origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())


def _known_hosts(settings: ServerSettings) -> set[str]:
    names: Iterable[str | None] = (*settings.known_hosts, settings.host, urlsplit(settings.public_url or "").hostname)
    return {name.lower() for name in names if name}


def _cannot_be_claimed(name: str) -> bool:
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return "." not in name or name.endswith(tuple(f".{domain}" for domain in _PRIVATE_DOMAINS))
    return True


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _forbidden(code: str, message: str) -> ApiError:
    return ApiError(403, message, code=code, headers={"x-should-retry": "false"})
