"""Probes and Prometheus metrics, within a second whatever the state of Redis."""

import asyncio
from typing import Any

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import QueueUnavailable
from engine.jobs.job import EngineInfo, QueueStats
from server.admission.engine_directory import not_ready_reason, ready_engines
from server.metrics import exposition
from server.redis_timeout import with_redis_timeout
from server.requests.schemas import HealthBody
from server.services import Services, ServicesDep

router = APIRouter(tags=["operations"])


@router.get("/live")
async def live() -> dict[str, str]:
    """Return 200 while this process responds, whatever the state of Redis and the engines."""
    return {"status": "ok"}


@router.get(
    "/health", responses={200: {"model": HealthBody}, 503: {"model": HealthBody, "description": "See `reason`."}}
)
async def health(services: ServicesDep) -> Response:
    """Return 200 if a request sent now would be served, otherwise 503 with the `reason`."""
    queue = services.queue
    try:
        engines, stats, takes_writes = await with_redis_timeout(
            asyncio.gather(queue.engines(), queue.stats(), queue.takes_writes())
        )
    except QueueUnavailable:
        return _health("The job queue (Redis) cannot be reached.", [], None)
    reason = _unavailable_reason(services, engines, stats, takes_writes=takes_writes)
    return _health(reason, engines, stats)


def _unavailable_reason(
    services: Services, engines: list[EngineInfo], stats: QueueStats, *, takes_writes: bool
) -> str | None:
    if not takes_writes:
        return "The job queue (Redis) refuses writes: memory or disk full, or a replica."
    if services.gate.draining:
        return "This server is shutting down."
    if not ready_engines(engines):
        return not_ready_reason(engines)
    if stats.waiting >= services.settings.max_queue:
        return "The queue is full."
    return None


def _health(reason: str | None, engines: list[EngineInfo], stats: QueueStats | None) -> Response:
    body: dict[str, Any] = {
        "status": "ok" if reason is None else "unavailable",
        "engines": [{"id": e.id, "pid": e.pid, "stage": e.stage, "state": e.state} for e in engines],
        "queue": {"waiting": stats.waiting, "running": stats.running} if stats else None,
    }
    if reason is not None:
        body["reason"] = reason
    return Response(orjson.dumps(body), 200 if reason is None else 503, media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: ServicesDep) -> Response:
    """Return Prometheus text: this process, the queue, and every live engine with an `engine` label."""
    queue = services.queue
    try:
        stats, engines, texts, takes_writes = await with_redis_timeout(
            asyncio.gather(queue.stats(), queue.engines(), queue.engine_metrics(), queue.takes_writes())
        )
    except QueueUnavailable:
        stats, engines, texts, takes_writes = None, [], {}, False
    services.metrics.queue(stats, engines, services.settings.max_queue, takes_writes=takes_writes)
    return Response(exposition(services.metrics.registry, texts), media_type=CONTENT_TYPE_LATEST)
