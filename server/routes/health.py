"""Probes and Prometheus metrics, within a second whatever the state of Redis and the number of probes."""

import asyncio
import hashlib
import secrets
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import QueueUnavailable
from engine.jobs.job import EngineInfo, QueueStats
from server.addresses import is_loopback
from server.admission.auth import has_key
from server.metrics import exposition
from server.responses.schemas import HealthBody
from server.services import Services, ServicesDep

router = APIRouter(tags=["operations"])

_SALT = secrets.token_bytes(16)


@router.get("/live")
async def live() -> dict[str, str]:
    """Return 200 while this process responds, whatever the state of Redis and the engines."""
    return {"status": "ok"}


@router.get(
    "/health", responses={200: {"model": HealthBody}, 503: {"model": HealthBody, "description": "See `reason`."}}
)
async def health(request: Request, services: ServicesDep) -> Response:
    """Return 200 if a request sent now would be served, otherwise 503 with the `reason`; at most 2 seconds old. Ids and
    pids of engines are for callers with a key, or without keys for those on this machine."""
    state = services.queue_state
    try:
        engines, stats, takes_writes, is_full, missing = await asyncio.gather(
            state.engines.get(),
            state.stats.get(),
            state.takes_writes.get(),
            services.admission.memory.is_full(),
            state.missing_stage(may_be_absent=services.settings.scale_to_zero),
        )
    except QueueUnavailable:
        return _health("The job queue (Redis) cannot be reached.", [], None)
    reason = _unavailable_reason(services, missing, stats, takes_writes=takes_writes, is_full=is_full)
    describe = _describe if _is_trusted(request, services) else _describe_without_ids
    return _health(reason, [describe(engine) for engine in engines], stats)


def _is_trusted(request: Request, services: Services) -> bool:
    if services.keys.open_to_all:
        return request.client is not None and is_loopback(request.client.host)
    return has_key(request, services.keys)


def _describe(engine: EngineInfo) -> dict[str, Any]:
    return {"id": engine.id, "pid": engine.pid, "stage": engine.stage, "state": engine.state}


def _describe_without_ids(engine: EngineInfo) -> dict[str, Any]:
    opaque = hashlib.blake2s(engine.id.encode(), key=_SALT, digest_size=6).hexdigest()
    return {**_describe(engine), "id": f"engine-{opaque}", "pid": None}


def _unavailable_reason(
    services: Services, missing: str | None, stats: QueueStats, *, takes_writes: bool, is_full: bool
) -> str | None:
    if not takes_writes:
        return "The job queue (Redis) refuses writes: memory or disk full, or a replica."
    if is_full:
        return "The job queue (Redis) is nearly out of memory."
    if services.gate.draining:
        return "This server is shutting down."
    if missing:
        return missing
    if stats.waiting >= services.settings.max_queue:
        return "The queue is full."
    return None


def _health(reason: str | None, engines: list[dict[str, Any]], stats: QueueStats | None) -> Response:
    body: dict[str, Any] = {
        "status": "ok" if reason is None else "unavailable",
        "engines": engines,
        "queue": {"waiting": stats.waiting, "running": stats.running} if stats else None,
    }
    if reason is not None:
        body["reason"] = reason
    return Response(orjson.dumps(body), 200 if reason is None else 503, media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: ServicesDep) -> Response:
    """Return Prometheus text: this process, the queue, and every live engine with an `engine` label."""
    state = services.queue_state
    try:
        stats, engines, texts, takes_writes = await asyncio.gather(
            state.stats.get(), state.engines.get(), state.engine_metrics.get(), state.takes_writes.get()
        )
    except QueueUnavailable:
        stats, engines, texts, takes_writes = None, [], {}, False
    services.metrics.queue(stats, engines, services.settings.max_queue, takes_writes=takes_writes)
    return Response(exposition(services.metrics.registry, texts), media_type=CONTENT_TYPE_LATEST)
