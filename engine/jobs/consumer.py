"""The engines' side of the job queue."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from engine.jobs.base import QueueBase
from engine.jobs.codec import decode_claim, decode_sources, encode_result
from engine.jobs.connection import redis_errors
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, JobError, JobResult, PartialImage, Plan, SourceImages
from engine.jobs.scripts import Argument


class JobConsumer(QueueBase):
    """Claims jobs and writes for them. A write for a lost claim returns False, without effect."""

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        """Claim the next job if it fits, else none: large and quarantined jobs must not starve.

        Lapsed leases come first, also this engine's: renew before.
        """
        while True:
            reply = await self._scripts.run(
                "claim",
                self._dead_letter_error,
                consumer=consumer,
                images=free.images,
                kv_tokens=free.kv_tokens,
                source_tokens=free.source_tokens,
                idle=free.idle,
                lease_ms=self._lease_ms,
                max_runs=self._max_runs,
            )
            if reply is None:
                return None
            if isinstance(reply, list):
                return decode_claim(reply)

    async def renew(self, consumer: str, claims: Iterable[Claim]) -> list[Claim]:
        """Restart leases, several times per `lease_ms`; return the lost claims."""
        claims = list(claims)
        if not claims:
            return []
        held = [(claim.job_id, claim.epoch) for claim in claims]
        return [claims[index] for index in await self._scripts.run("renew", consumer=consumer, claims=held)]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Store the progress."""
        return await self._write("progress", claim, orjson.dumps(progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Store a plan for a later run."""
        return await self._write("checkpoint_plan", claim, orjson.dumps(plan.to_dict()), index=index)

    async def source_images(self, claim: Claim) -> SourceImages | None:
        """Return a live edit's images."""
        with redis_errors():
            return decode_sources(await self._redis.hgetall(self.key("sources", claim.job_id)))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Store a partial image."""
        grid = orjson.dumps(partial.grid)
        return await self._write("partial_image", claim, partial.data, grid, image=partial.image, index=partial.index)

    async def cached_plans(self, keys: Sequence[str]) -> list[Plan | None]:
        """Return cached plans."""
        with redis_errors():
            plans = await self._redis.mget([self.key("plan", key) for key in keys])
        return [None if plan is None else Plan.from_dict(orjson.loads(plan)) for plan in plans]

    async def cache_plan(self, key: str, plan: Plan, ttl_s: int) -> None:
        """Cache a plan."""
        with redis_errors():
            await self._redis.set(self.key("plan", key), orjson.dumps(plan.to_dict()), ex=ttl_s)

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        """Store the result and end the job."""
        return await self._write("commit", claim, *encode_result(result))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        """End the job as failed."""
        return await self._write("fail", claim, orjson.dumps(error.to_dict()))

    async def requeue(self, consumer: str, claim: Claim) -> bool:
        """Requeue the job; this run does not count."""
        return await self._write("requeue", claim, consumer=consumer)

    async def requeue_all(self, consumer: str, blame: bool = True) -> int:
        """Requeue a dead engine's jobs; return how many.

        Args:
            blame: the jobs may have ended the engine. False leaves no trace of the run.
        """
        return await self._scripts.run("requeue_all", consumer=consumer, blame=blame)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """List the engine as live for `ttl_s`."""
        await self._scripts.run(
            "heartbeat", orjson.dumps(info.to_dict()), metrics, id=info.id, ttl_ms=round(ttl_s * 1000)
        )

    async def deregister(self, engine_id: str) -> None:
        """Delete the heartbeat."""
        with redis_errors():
            await self._redis.delete(self.key("engine", engine_id))

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when work was queued since the last call, or after `timeout_s`."""
        await self._wake_ups.wait(timeout_s)

    async def _write(self, script: str, claim: Claim, *blobs: str | bytes, **arguments: Argument) -> bool:
        return bool(await self._scripts.run(script, *blobs, id=claim.job_id, epoch=claim.epoch, **arguments))
