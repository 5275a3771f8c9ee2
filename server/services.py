import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from engine.jobs.connection import connect
from engine.jobs.producer import JobProducer
from engine.jobs.result_store import open_result_store
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admission
from server.admission.api_heartbeat import ApiHeartbeat
from server.admission.gate import Gate
from server.admission.keys import ANONYMOUS, KeyRing
from server.admission.memory_budget import Hold, MemoryBudget
from server.admission.queue_state import QueueState
from server.admission.rate_limits import RateLimits
from server.image_files.decoders import Decoders
from server.metrics import Metrics
from server.requests.prompt_rewriter import Rewriter, open_rewriter
from server.responses.outcomes import JobOutcomes
from server.settings import ServerSettings


@dataclass(frozen=True)
class Services:
    settings: ServerSettings
    queue: JobProducer
    queue_state: QueueState
    keys: KeyRing
    admission: Admission
    rewriter: Rewriter | None
    abandoned_jobs: AbandonedJobs
    outcomes: JobOutcomes
    gate: Gate
    metrics: Metrics
    memory: MemoryBudget
    decoders: Decoders
    started_at: int = field(default_factory=lambda: int(time.time()))  # seconds since the epoch

    def base_url(self, request: Request) -> str:
        """Return this server's URL for the client, without a trailing slash."""
        return self.settings.public_url or str(request.base_url).rstrip("/")

    def held_for(self, request: Request) -> Hold:
        """Return a count of the memory that the request's response takes."""
        caller = getattr(request.state, "caller", ANONYMOUS)
        return request.state.places.enter_context(self.memory.hold(caller))


@asynccontextmanager
async def open_services(
    settings: ServerSettings, queue: JobProducer | None, *, gate: Gate, metrics: Metrics, keys: KeyRing
) -> AsyncIterator[Services]:
    """Open the services, by default with a queue at `settings.redis_url`."""
    async with (
        nullcontext(queue) if queue else open_queue(str(settings.redis_url), settings) as job_queue,
        open_rewriter(settings, metrics) as rewriter,
        aclosing(Decoders()) as decoders,
    ):
        memory = MemoryBudget(settings.max_inflight_bytes)
        metrics.inflight_bytes.set_function(lambda: memory.in_use)
        abandoned_jobs = AbandonedJobs(job_queue, metrics)
        heartbeat = ApiHeartbeat(job_queue)
        heartbeat.start()
        admission = Admission(
            job_queue,
            RateLimits(job_queue),
            settings.max_queue,
            abandoned_jobs,
            settings.max_source_bytes,
            settings.result_bytes,
            api_id=heartbeat.api_id,
        )
        outcomes = JobOutcomes(job_queue, metrics, admission.throughput)
        yield Services(
            settings=settings,
            queue=job_queue,
            queue_state=QueueState(job_queue),
            keys=keys,
            admission=admission,
            rewriter=rewriter,
            abandoned_jobs=abandoned_jobs,
            outcomes=outcomes,
            gate=gate,
            metrics=metrics,
            memory=memory,
            decoders=decoders,
        )
        await outcomes.close()
        await abandoned_jobs.close()
        await heartbeat.close()


@asynccontextmanager
async def open_queue(redis_url: str, settings: ServerSettings) -> AsyncIterator[JobProducer]:
    """Open a queue with a Redis client, which connects on first use."""
    client = connect(redis_url)
    store = open_result_store(settings.result_store, settings.result_store_public_url)
    queue = JobProducer(client, min_replicas=settings.redis_min_replicas, result_store=store)
    try:
        yield queue
    finally:
        await queue.close()
        await client.aclose()


async def get_services(request: Request) -> Services:
    """Return the services of the request's app."""
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(get_services)]
