"""The ASGI application. `create_app` wires the parts; the way of a request is in `server.routes.images`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.jobs.connection import connect
from engine.jobs.producer import JobProducer
from engine.observability.tracing import open_tracing
from server import openapi
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admission
from server.admission.engine_directory import EngineDirectory
from server.admission.gate import Gate
from server.admission.keys import KeyRing
from server.admission.rate_limits import RateLimits
from server.errors import install_handlers
from server.metrics import Metrics
from server.middleware import RequestObserver
from server.requests.prompt_rewriter import open_rewriter
from server.responses.outcomes import JobOutcomes
from server.routes import files, health, images, jobs, models, pages
from server.services import Services
from server.settings import ServerSettings

_HEADERS_FOR_SCRIPTS = (
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
    """The API as an ASGI app. `app.state.gate` is the gate to close before it is shut down.

    Args:
        queue: the queue to use; by default the app opens one at `settings.redis_url` and closes it at its end.

    Raises:
        ValueError: neither a queue nor `settings.redis_url` is given.
        KeyFileError: `settings.api_keys_file` cannot be used.
        TracingError: the environment asks for traces that cannot be had.
    """
    if queue is None and settings.redis_url is None:
        raise ValueError("the API needs a Redis: set GLIMMER_REDIS_URL")
    gate, metrics, keys = Gate(), Metrics(), KeyRing(settings)
    tracing = open_tracing("glimmer-api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            nullcontext(queue) if queue else open_queue(str(settings.redis_url)) as job_queue,
            open_rewriter(settings, metrics) as rewriter,
        ):
            abandoned_jobs = AbandonedJobs(job_queue, metrics)
            admission = Admission(
                job_queue, RateLimits(job_queue), settings.max_queue, abandoned_jobs, settings.max_source_bytes
            )
            outcomes = JobOutcomes(job_queue, metrics, admission.throughput)
            app.state.services = Services(
                settings=settings,
                queue=job_queue,
                engines=EngineDirectory(job_queue),
                keys=keys,
                admission=admission,
                rewriter=rewriter,
                abandoned_jobs=abandoned_jobs,
                outcomes=outcomes,
                gate=gate,
                metrics=metrics,
            )
            yield
            await outcomes.close()
            await abandoned_jobs.close()
        await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Glimmer",
        description="GLM-Image behind an OpenAI-style images API.",
        lifespan=lifespan,
        # FastAPI's own pages load their scripts from elsewhere; /docs is one of ours.
        docs_url=None,
        redoc_url=None,
        # FastAPI's own traces and logs have URLs and texts of errors in them, which may quote a prompt.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gate = gate
    app.add_middleware(RequestObserver, metrics=metrics, tracing=tracing)
    if settings.allowed_origins:
        # Added last, so outermost: a script in a browser is to see errors, too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # the official SDK sends a dozen of its own
            expose_headers=_HEADERS_FOR_SCRIPTS,
        )
    install_handlers(app)
    for module in (images, jobs, files, models, health, pages):
        app.include_router(module.router)
    app.openapi = lambda: openapi.document(app, open_to_all=keys.open_to_all)  # the hook FastAPI documents for this
    return app


@asynccontextmanager
async def open_queue(redis_url: str) -> AsyncIterator[JobProducer]:
    """A queue with a Redis client of its own; nothing is sent before its first use."""
    client = connect(redis_url)
    queue = JobProducer(client)
    try:
        yield queue
    finally:
        await queue.close()
        await client.aclose()
