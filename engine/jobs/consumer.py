"""The engines' side of the queue: claim jobs, keep their leases, write their progress and results."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from engine.jobs.base import QueueBase
from engine.jobs.codec import decode_claim, decode_sources, encode_result
from engine.jobs.connection import redis_errors
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, JobError, JobResult, PartialImage, Plan, SourceImages
from engine.jobs.scripts import Argument


class JobConsumer(QueueBase):
    """The engines' side of the queue.

    The methods that write for a claim return whether it still holds; if not, nothing was written.
    """

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        """Claim the next job, if there is one and it fits. Jobs whose lease has lapsed come first.

        A job that does not fit blocks the queue until it fits here or another engine takes it. So large jobs do not
        starve, nor do quarantined ones, for which an engine must become idle. Lapsed leases of this engine count too:
        renew before claiming.

        Args:
            consumer: the engine's id, unique among the live engines.
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
        """Restart the leases of these claims. Call it several times per `lease_ms`, or others take the jobs.

        Returns:
            The lost claims: cancelled, taken over, or past the deadline, which expires the job. Drop those; later
            writes for them have no effect.
        """
        claims = list(claims)
        if not claims:
            return []
        held = [(claim.job_id, claim.epoch) for claim in claims]
        return [claims[index] for index in await self._scripts.run("renew", consumer=consumer, claims=held)]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Store how far the job is."""
        return await self._write("progress", claim, orjson.dumps(progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Store the finished plan of image `index`, so that a later run of the job starts from it."""
        return await self._write("checkpoint_plan", claim, orjson.dumps(plan.to_dict()), index=index)

    async def source_images(self, claim: Claim) -> SourceImages | None:
        """Return the source images of an edit; None for other jobs, and after the end."""
        with redis_errors():
            return decode_sources(await self._redis.hgetall(self.key("sources", claim.job_id)))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Store a partial image for the followers of the job."""
        grid = orjson.dumps(partial.grid)
        return await self._write("partial_image", claim, partial.data, grid, image=partial.image, index=partial.index)

    async def cached_plans(self, keys: Sequence[str]) -> list[Plan | None]:
        """Return the cached plans under these keys."""
        with redis_errors():
            plans = await self._redis.mget([self.key("plan", key) for key in keys])
        return [None if plan is None else Plan.from_dict(orjson.loads(plan)) for plan in plans]

    async def cache_plan(self, key: str, plan: Plan, ttl_s: int) -> None:
        """Cache a plan for `ttl_s` seconds."""
        with redis_errors():
            await self._redis.set(self.key("plan", key), orjson.dumps(plan.to_dict()), ex=ttl_s)

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        """Store the result and end the job as succeeded, atomically."""
        return await self._write("commit", claim, *encode_result(result))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        """End the job as failed."""
        return await self._write("fail", claim, orjson.dumps(error.to_dict()))

    async def requeue(self, consumer: str, claim: Claim) -> bool:
        """Put the job back in its old place; this run does not count."""
        return await self._write("requeue", claim, consumer=consumer)

    async def requeue_all(self, consumer: str) -> int:
        """Put back every job of a dead engine without waiting for its leases, and remove its consumer.

        The runs count. Returns how many jobs it held.
        """
        return await self._scripts.run("requeue_all", consumer=consumer)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """List the engine as live for `ttl_s` seconds.

        Args:
            metrics: Prometheus text exposition.
        """
        await self._scripts.run(
            "heartbeat", orjson.dumps(info.to_dict()), metrics, id=info.id, ttl_ms=round(ttl_s * 1000)
        )

    async def deregister(self, engine_id: str) -> None:
        """Delete the heartbeat; the next listing of the engines removes it from the index."""
        with redis_errors():
            await self._redis.delete(self.key("engine", engine_id))

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when a job was submitted or requeued since the last call returned, or after `timeout_s`.

        Raises nothing while Redis is away.
        """
        await self._wake_ups.wait(timeout_s)

    async def _write(self, script: str, claim: Claim, *blobs: str | bytes, **arguments: Argument) -> bool:
        return bool(await self._scripts.run(script, *blobs, id=claim.job_id, epoch=claim.epoch, **arguments))
