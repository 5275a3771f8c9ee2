"""Small jobs, and the calls that every test of the queue makes."""

import itertools
import os
import signal
import time
from typing import Any

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, FreeCapacity, JobSpec, Priority, SourceImages
from engine.jobs.results import ImageResult, JobResult
from tests.job_queue import JobQueue

ROOMY = FreeCapacity(images=100, kv_tokens=10**9, source_tokens=10**9, idle=False)
IDLE = FreeCapacity(images=0, kv_tokens=0, source_tokens=0, idle=True)
RESULT = JobResult([ImageResult(bytes(range(256)), seed=7)], prompt_tokens=5, plan_tokens=260)

TIMEOUT_S = 10.0  # only a hang takes so long

_numbers = itertools.count()


def spec(**fields: Any) -> JobSpec:
    return JobSpec(**({"prompt": "a red cube", "width": 64, "height": 64, "seed": 7} | fields))


async def submit(
    queue: JobQueue,
    *,
    job_id: str | None = None,
    timeout_s: float = 60,
    priority: Priority = "interactive",
    max_queue: int = 100,
    source_images: SourceImages | None = None,
    max_source_bytes: int | None = None,
    notes: dict[str, Any] | None = None,
    ended_notes: dict[str, Any] | None = None,
    owner: str = "",
    max_owned: int | None = None,
    max_result_bytes: int | None = None,
    max_kept_bytes: int | None = None,
    owner_parts: int | None = None,
    url_copies: bool = False,
    idempotency_key: str = "",
    fingerprint: str = "",
    dry_run: bool = False,
    api_id: str = "",
    **fields: Any,
) -> str:
    """Submit a small job with these fields of its spec; return its id, or that of the key's first job."""
    if source_images is not None:
        fields["num_sources"] = len(source_images.files)
    submitted = await queue.submit(
        spec(**fields),
        job_id=job_id or f"job-{next(_numbers)}",
        timeout_s=timeout_s,
        priority=priority,
        max_queue=max_queue,
        source_images=source_images,
        max_source_bytes=max_source_bytes,
        notes=notes,
        ended_notes=ended_notes,
        owner=owner,
        max_owned=max_owned,
        max_result_bytes=max_result_bytes,
        max_kept_bytes=max_kept_bytes,
        owner_parts=owner_parts,
        url_copies=url_copies,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        dry_run=dry_run,
        api_id=api_id,
    )
    return submitted.job_id


async def claim(queue: JobQueue, consumer: str = "engine-1", free: FreeCapacity = ROOMY) -> Claim:
    """Claim a job; there must be one."""
    claim = await queue.claim(consumer, free)
    assert claim is not None
    return claim


async def pass_deadline(queue: JobQueue, job_id: str) -> None:
    """Set the deadline of a job into the past."""
    await queue.client.hset(f"{queue.prefix}:job:{job_id}", "deadline", 0)  # type: ignore[misc]


def restart(server: EmbeddedRedis) -> None:
    """Start a dead server again and wait until it takes commands."""
    server.restart()
    give_up_at = time.monotonic() + 10
    while not server.answers():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def kill(server: EmbeddedRedis) -> None:
    """Kill the server."""
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.01)
