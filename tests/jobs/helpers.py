"""Small jobs and the calls every test of the queue makes."""

import itertools
import os
import signal
import time
from typing import Any

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Budget, Claim, ImageResult, JobResult, JobSpec, Priority
from engine.jobs.queue import JobQueue

ROOMY = Budget(images=100, kv_tokens=10**9, idle=False)
IDLE = Budget(images=0, kv_tokens=0, idle=True)
RESULT = JobResult([ImageResult(bytes(range(256)), seed=7)], prompt_tokens=5, plan_tokens=260)

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
    **fields: Any,
) -> str:
    """Submits a small job and returns its id."""
    job_id = job_id or f"job-{next(_numbers)}"
    await queue.submit(spec(**fields), job_id=job_id, timeout_s=timeout_s, priority=priority, max_queue=max_queue)
    return job_id


async def claim(queue: JobQueue, consumer: str = "engine-1", budget: Budget = ROOMY) -> Claim:
    """Claims a job where there must be one."""
    claim = await queue.claim(consumer, budget)
    assert claim is not None
    return claim


def restart(server: EmbeddedRedis) -> None:
    """Starts a dead server again and returns when it takes commands."""
    server.restart()
    give_up_at = time.monotonic() + 10
    while not server.answers():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def kill(server: EmbeddedRedis) -> None:
    """Ends the server without warning."""
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.01)
