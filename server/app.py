import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.jobs.producer import JobProducer
from engine.observability.tracing import open_tracing
from server import openapi
from server.admission.gate import Gate
from server.admission.keys import KeyRing
from server.admission.web_pages import WebPageGuard
from server.errors import install_handlers
from server.metrics import Metrics
from server.middleware import RequestObserver
from server.routes import files, health, images, jobs, models, pages
from server.services import open_services
from server.settings import ServerSettings

_EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "location",
)


def create_app(settings: ServerSettings, queue: JobProducer | None = None) -> FastAPI:
    """Return the API as an ASGI app; close `app.state.gate` before shutdown.

    Raises:
        ValueError: no `queue`, and no `settings.redis_url`.
        KeyFileError: `settings.api_keys_file` is not valid.
        TracingError: traces cannot be sent.
    """
    if queue is None and settings.redis_url is None:
        raise ValueError("the API needs a Redis: set GLIMMER_REDIS_URL")
    metrics, keys = Metrics(), KeyRing(settings)
    gate = Gate(metrics, settings.max_queue)
    tracing = open_tracing("glimmer-api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, queue, gate=gate, metrics=metrics, keys=keys) as services:
            app.state.services = services
            async with keys.watch():
                yield
        await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Glimmer",
        description="GLM-Image behind an OpenAI-style images API.",
        version=metadata.version("glimmer"),
        lifespan=lifespan,
        redirect_slashes=False,  # `RequestObserver` removes them
        openapi_url=None,  # and no pages of FastAPI, which load scripts from other servers: `pages` serves both
        # Its traces and logs may quote a prompt.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gate = gate
    if keys.open_to_all:  # a page has no key
        app.add_middleware(WebPageGuard, settings=settings, metrics=metrics)
    app.add_middleware(RequestObserver, metrics=metrics, tracing=tracing)
    if settings.allowed_origins:
        _allow_origins(app, settings.allowed_origins)
    install_handlers(app)
    for module in (images, jobs, files, models, health, pages):
        app.include_router(module.router)
    app.openapi = lambda: openapi.document(app, open_to_all=keys.open_to_all)  # FastAPI's documented hook
    return app


def _allow_origins(app: FastAPI, origins: list[str]) -> None:
    """Add CORS, last: errors need its headers, too."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),  # the official SDK sends a dozen of its own
        expose_headers=_EXPOSED_HEADERS,
    )
