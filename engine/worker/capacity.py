from collections.abc import Collection

from engine.jobs.job import FreeCapacity
from engine.limits import EngineLimits
from engine.worker.job_runner import RunningJob


def free_capacity(limits: EngineLimits, jobs: Collection[RunningJob]) -> FreeCapacity:
    """Return what an engine can admit beside its jobs."""
    planning = [job.claim.spec for job in jobs if not job.request.is_planned]
    kv_tokens = sum(spec.plan_tokens + spec.prompt_tokens_bound for spec in planning)
    source_tokens = sum(job.source_tokens for job in jobs)
    return FreeCapacity(
        images=limits.max_images - sum(job.claim.spec.n for job in jobs),
        kv_tokens=max(0, limits.kv_tokens - kv_tokens),  # a planned job needs none
        source_tokens=max(0, limits.source_tokens - source_tokens),
        idle=not jobs,
    )
