"""The engines' side of the queue: take jobs, keep their leases, write down what comes of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from engine.jobs.base import QueueBase
from engine.jobs.codec import decode_claim, decode_sources, encode_result
from engine.jobs.connection import redis_errors
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, JobError, JobResult, PartialImage, Plan, SourceImages
from engine.jobs.scripts import Argument


class JobConsumer(QueueBase):
    """The engines' side of the queue."""

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        """Takes the next job, if there is one and it fits the budget. Jobs whose lease has lapsed come first.

        A job that does not fit is not passed over: nothing is granted until it fits here or another engine takes it.
        So large jobs do not starve, nor do jobs that must run alone (`Claim.quarantined`), for which an engine has to
        run dry. The engine's own lapsed leases count too: renew before claiming.

        Args:
            consumer: the engine's name in the queue, unique among the living.
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
        """Starts the leases of these claims anew; several times per `lease_ms`, or others take the jobs.

        Returns the claims that are lost: cancelled, taken over, or past their deadline (which ends them here). The
        engine drops those; nothing it writes for them would count.
        """
        claims = list(claims)
        if not claims:
            return []
        held = [(claim.job_id, claim.epoch) for claim in claims]
        return [claims[index] for index in await self._scripts.run("renew", consumer=consumer, claims=held)]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Tells how far the job is. False: the claim is lost, nothing was written (as for all writes below)."""
        return await self._write("progress", claim, orjson.dumps(progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Keeps the finished plan of image `index`, so that a later run of the job starts from it."""
        return await self._write("checkpoint_plan", claim, orjson.dumps(plan.to_dict()), index=index)

    async def source_images(self, claim: Claim) -> SourceImages | None:
        """What an edit starts from; None for a job that is no edit, or has ended."""
        with redis_errors():
            return decode_sources(await self._redis.hgetall(self._key("sources", claim.job_id)))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Shows a picture on its way to whoever follows the job."""
        grid = orjson.dumps(partial.grid)
        return await self._write("partial_image", claim, partial.data, grid, image=partial.image, index=partial.index)

    async def cached_plans(self, keys: Sequence[str]) -> list[Plan | None]:
        """The plans kept under these keys."""
        with redis_errors():
            found = await self._redis.mget([self._key("plan", key) for key in keys])
        return [None if plan is None else Plan.from_dict(orjson.loads(plan)) for plan in found]

    async def cache_plan(self, key: str, plan: Plan, ttl_s: int) -> None:
        """Keeps a plan for `ttl_s` seconds."""
        with redis_errors():
            await self._redis.set(self._key("plan", key), orjson.dumps(plan.to_dict()), ex=ttl_s)

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        """Stores the result and ends the job as succeeded, in one step."""
        return await self._write("commit", claim, *encode_result(result))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        """Ends the job as failed."""
        return await self._write("fail", claim, orjson.dumps(error.to_dict()))

    async def requeue(self, consumer: str, claim: Claim) -> bool:
        """Hands the job back to its old place in the queue; this run does not count against it."""
        return await self._write("requeue", claim, consumer=consumer)

    async def requeue_all(self, consumer: str) -> int:
        """Hands back every job of a consumer that is known to be dead, instead of waiting for its leases to lapse,
        and removes the consumer. The runs count. Returns how many jobs it held."""
        return await self._scripts.run("requeue_all", consumer=consumer)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """Says that the engine lives, for the next `ttl_s` seconds.

        Args:
            metrics: Prometheus text exposition.
        """
        await self._scripts.run(
            "heartbeat", orjson.dumps(info.to_dict()), metrics, id=info.id, ttl_ms=round(ttl_s * 1000)
        )

    async def deregister(self, engine_id: str) -> None:
        """Takes the heartbeat back; the index forgets the engine with the next look at it."""
        with redis_errors():
            await self._redis.delete(self._key("engine", engine_id))

    async def wait_for_work(self, timeout_s: float) -> None:
        """Returns when a job was submitted or handed back since the last call returned, or after `timeout_s`.
        Raises nothing while Redis is away."""
        await self._wake_ups.wait(timeout_s)

    async def _write(self, script: str, claim: Claim, *blobs: str | bytes, **arguments: Argument) -> bool:
        """Run a script that takes effect only under the epoch of a claim. Returns whether it did."""
        return bool(await self._scripts.run(script, *blobs, id=claim.job_id, epoch=claim.epoch, **arguments))
