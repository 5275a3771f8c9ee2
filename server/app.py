"""The ASGI application. `create_app` wires the parts; the way of a request is in `server.routes.images`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI

from engine.jobs.connection import connect
from engine.jobs.queue import JobQueue
from server.admission import Admission, EngineDirectory, Gate
from server.errors import install_handlers
from server.metrics import Metrics
from server.middleware import RequestObserver
from server.routes import health, images, models
from server.schemas import GenerationRequest
from server.services import Services
from server.settings import ServerSettings
from server.withdrawals import Withdrawals


def create_app(settings: ServerSettings, queue: JobQueue | None = None) -> FastAPI:
    """The API as an ASGI app. `app.state.gate` is the gate to close before it is shut down.

    Args:
        queue: the queue to use; by default the app opens one at `settings.redis_url` and closes it at its end.

    Raises:
        ValueError: neither a queue nor `settings.redis_url` is given.
    """
    if queue is None and settings.redis_url is None:
        raise ValueError("the API needs a Redis: set GLIMMER_REDIS_URL")
    gate, metrics = Gate(), Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with nullcontext(queue) if queue else open_queue(str(settings.redis_url)) as jobs:
            withdrawals = Withdrawals(jobs, metrics)
            app.state.services = Services(
                settings=settings,
                queue=jobs,
                engines=EngineDirectory(jobs),
                admission=Admission(jobs, settings.max_queue, withdrawals),
                withdrawals=withdrawals,
                gate=gate,
                metrics=metrics,
            )
            yield
            await withdrawals.close()

    app = FastAPI(
        title="Glimmer", description="GLM-Image behind an OpenAI-style images API.", lifespan=lifespan, redoc_url=None
    )
    app.state.gate = gate
    app.add_middleware(RequestObserver, metrics=metrics)
    install_handlers(app)
    for module in (images, models, health):
        app.include_router(module.router)
    app.openapi = lambda: _openapi(app, open_to_all=settings.api_key is None)  # the hook FastAPI documents for this
    return app


@asynccontextmanager
async def open_queue(redis_url: str) -> AsyncIterator[JobQueue]:
    """A queue with a Redis client of its own; nothing is sent before its first use."""
    client = connect(redis_url)
    queue = JobQueue(client)
    try:
        yield queue
    finally:
        await queue.close()
        await client.aclose()


def _openapi(app: FastAPI, *, open_to_all: bool) -> dict[str, Any]:
    """FastAPI's document, with the body that `server.schemas` checks, without the 422 that never happens, and without a
    key where none is asked for."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = FastAPI.openapi(app)
    body = GenerationRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas.update(body.pop("$defs"), GenerationRequest=body)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if open_to_all:
                operation.pop("security", None)
    return document
