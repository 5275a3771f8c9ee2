"""What probes and Prometheus ask. These routes answer within two seconds, whatever state Redis is in."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import QueueUnavailable
from engine.jobs.job import EngineInfo, QueueStats
from server.admission import in_time, ready_engines, why_not_ready
from server.metrics import exposition
from server.services import Services, services

router = APIRouter(tags=["operations"])


@router.get("/live")
async def live() -> dict[str, str]:
    """200 while this process answers; says nothing of Redis or the engines."""
    return {"status": "ok"}


@router.get("/health")
async def health(app: Annotated[Services, Depends(services)]) -> Response:
    """200 when a request sent now would be served, otherwise 503 with the `reason`.

    A full queue is no reason: it is answered with 429, and taking a full replica out of a load balancer would only
    push its clients to the others.
    """
    try:
        engines, stats = await in_time(asyncio.gather(app.queue.engines(), app.queue.stats()))
    except QueueUnavailable:
        return _health("The job queue (Redis) cannot be reached.", [], None)
    if app.gate.closed:
        return _health("This server is shutting down.", engines, stats)
    return _health(None if ready_engines(engines) else why_not_ready(engines), engines, stats)


@router.get("/metrics")
async def metrics(app: Annotated[Services, Depends(services)]) -> Response:
    """Prometheus text: this process, the queue, and every live engine under its `engine` label."""
    try:
        stats, engines = await in_time(asyncio.gather(app.queue.stats(), app.queue.engine_metrics()))
    except QueueUnavailable:
        stats, engines = None, {}
    app.metrics.queue(stats)
    return Response(exposition(app.metrics.registry, engines), media_type=CONTENT_TYPE_LATEST)


def _health(reason: str | None, engines: list[EngineInfo], stats: QueueStats | None) -> Response:
    body: dict[str, Any] = {
        "status": "ok" if reason is None else "unavailable",
        "engines": [{"id": e.id, "pid": e.pid, "stage": e.stage, "state": e.state} for e in engines],
        "queue": asdict(stats) if stats else None,
    }
    if reason is not None:
        body["reason"] = reason
    return Response(orjson.dumps(body), 200 if reason is None else 503, media_type="application/json")
