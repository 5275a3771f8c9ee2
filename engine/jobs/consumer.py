"""The engines' side of the job queue."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import redis.asyncio

from engine.errors import UnreadableJob
from engine.jobs.base import QueueBase
from engine.jobs.codec import (
    decode_cached_plan,
    decode_claim,
    decode_preview,
    decode_sources,
    encode_hand_over,
    encode_plan,
    encode_result,
    reading,
)
from engine.jobs.connection import redis_errors
from engine.jobs.events import WakeUps
from engine.jobs.job import (
    JOB_FORMAT,
    MAX_PLAN_BYTES,
    PLAN_PART,
    UNREADABLE_JOB,
    Claim,
    EngineInfo,
    FreeCapacity,
    HandedOver,
    JobError,
    Plan,
    PreviewOffer,
    SourceImages,
    Stage,
    TokenGrid,
)
from engine.jobs.result_store import object_key
from engine.jobs.results import ImageResult, JobResult, PartialImage
from engine.jobs.scripts import Argument
from engine.tasks import gather_all

_DEAD_LETTER_ERROR = JobError("The job brought its engine down each time it ran and was given up.")


class JobConsumer(QueueBase):
    """Claims jobs and writes for them. A write for a lost claim returns False.

    Args:
        stage: of the jobs to claim: those to plan, those that were handed over, or both.
    """

    known_format = JOB_FORMAT
    planner = ""  # fingerprint; plans of another are not resumed

    def __init__(self, redis: redis.asyncio.Redis, *, stage: Stage = "all", **options: Any):
        super().__init__(redis, **options)
        self.stage: Stage = stage
        self._unanswered: dict[str, str] = {}  # claim attempts without a reply, by consumer
        channels = {"plan": ["wake"], "render": ["wake:render"], "all": ["wake", "wake:render"]}[stage]
        self._wake_ups = WakeUps(redis, *map(self.key, channels))
        self._preview_wake_ups = WakeUps(redis, self.key("previews"))

    async def close(self) -> None:
        """End the subscriptions; the client stays open."""
        await super().close()
        await self._wake_ups.close()
        await self._preview_wake_ups.close()

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        """Claim the next job if it fits, else none: large and quarantined jobs must not starve.

        Lapsed leases come first, also this engine's: renew before. After a lost reply, the next call gets the same
        grant.
        """
        attempt = self._unanswered.pop(consumer, None) or secrets.token_hex(8)
        try:
            while True:
                granted = await self.attempt_claim(consumer, free, attempt)
                if granted is None or not await self.renew(consumer, [granted]):
                    return granted
                attempt = secrets.token_hex(8)
        except BaseException:
            self._unanswered[consumer] = attempt
            raise

    async def attempt_claim(self, consumer: str, free: FreeCapacity, attempt: str) -> Claim | None:
        """Claim a job, not yet a run. A repeated attempt gets the same grant."""
        while True:
            reply = await self._scripts.run(
                "claim",
                orjson.dumps(_DEAD_LETTER_ERROR.to_dict()),
                consumer=consumer,
                attempt=attempt,
                stage=self.stage,
                images=free.images,
                kv_tokens=free.kv_tokens,
                source_tokens=free.source_tokens,
                idle=free.idle,
                lease_ms=self._lease_ms,
                max_format=self.known_format,
                orphan_ms=self._orphan_ms,
            )
            if reply is None:
                return None
            if isinstance(reply, list):
                job_id, epoch = reply[0].decode(), reply[1]
                with suppress(UnreadableJob), reading(job_id):
                    return decode_claim(reply, self.planner)
                error = orjson.dumps(UNREADABLE_JOB.to_dict())
                await self._scripts.run("fail", error, id=job_id, epoch=epoch)

    async def renew(self, consumer: str, claims: Iterable[Claim]) -> list[Claim]:
        """Restart leases, several times per `lease_ms`; return the lost claims.

        The first renewal makes a claim a run; one of a lost claim shows that its engine lives.
        """
        claims = list(claims)
        if not claims:
            return []
        held = [(claim.job_id, claim.epoch) for claim in claims]
        lost = await self._scripts.run("renew", consumer=consumer, claims=held, orphan_ms=self._orphan_ms)
        return [claims[index] for index in lost]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Store the progress."""
        return await self._write("progress", claim, orjson.dumps(progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Store a plan for a later run."""
        return await self._write("checkpoint_plan", claim, encode_plan(plan, self.planner), index=index)

    async def hand_over(
        self, consumer: str, claim: Claim, plans: Mapping[int, Plan], prompt_tokens: int, sources: list[TokenGrid]
    ) -> bool:
        """Queue a planned job for the renderers; this run does not count.

        Args:
            plans: those that are not checkpointed, by image.
            sources: codes of its source images.
        """
        fields = encode_hand_over(plans, HandedOver(prompt_tokens, sources), self.planner)
        return await self._write("hand_over", claim, *fields, consumer=consumer)

    async def offer_preview(self, claim: Claim, image: int, grid: TokenGrid) -> bool:
        """Let a renderer render a preview while the job is planned here; it may get lost."""
        return await self._write("offer_preview", claim, orjson.dumps(grid.to_dict()), image=image)

    async def take_preview(self) -> PreviewOffer | None:
        """Return a preview to render, which no other engine gets."""
        while (reply := await self._scripts.run("take_preview")) is not None:
            job_id = reply[0].decode()
            with suppress(UnreadableJob), reading(job_id):
                return decode_preview(reply)
        return None

    async def source_images(self, claim: Claim) -> SourceImages | None:
        """Return a live edit's images; raise `UnreadableJob` if damaged."""
        with redis_errors(), reading(claim.job_id):
            return decode_sources(await self._redis.hgetall(self.key("sources", claim.job_id)))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Store a partial image."""
        return await self._write_partial(claim.job_id, claim.epoch, partial)

    async def preview_image(self, offer: PreviewOffer, partial: PartialImage) -> bool:
        """Store an offered preview, if its job is still planned."""
        return await self._write_partial(offer.job_id, offer.epoch, partial)

    async def cached_plans(self, keys: Sequence[str]) -> list[Plan | None]:
        """Return cached plans."""
        with redis_errors():
            plans = await self._redis.mget([self.key("plan", key) for key in keys])
        return [None if plan is None else decode_cached_plan(plan) for plan in plans]

    async def cache_plan(self, key: str, plan: Plan, ttl_s: int) -> None:
        """Cache a plan; beyond `MAX_PLAN_BYTES`, the oldest go."""
        limits: dict[str, Argument] = {"max_bytes": MAX_PLAN_BYTES, "part": PLAN_PART}
        await self._scripts.run("cache_plan", orjson.dumps(plan.to_dict()), key=key, ttl_ms=1000 * ttl_s, **limits)

    async def store_images(self, claim: Claim, images: Sequence[ImageResult]) -> list[ImageResult]:
        """Write the images of a result to the result store, if there is one, to be committed as where they are.

        Raises:
            StoreUnavailable: write them again.
        """
        if (store := self.result_store) is None:
            return list(images)
        extension = claim.spec.output_format

        async def put(index: int, image: ImageResult) -> ImageResult:
            key = object_key(claim.job_id, claim.epoch, index, extension)
            return replace(image, data=b"", stored=await store.put(key, image.data, f"image/{extension}"))

        return await gather_all(put(index, image) for index, image in enumerate(images))

    async def drop_images(self, images: Iterable[ImageResult]) -> None:
        """Delete stored images that were not committed."""
        if self.result_store is not None:
            await self.result_store.delete([image.stored.key for image in images if image.stored])

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
            blame: the jobs may have ended the engine. False leaves no trace of its runs.
        """
        return await self._scripts.run("requeue_all", consumer=consumer, blame=blame)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """List the engine as live for `ttl_s`."""
        plans = info.state == "ready" and info.stage != "render"
        await self._scripts.run(
            "heartbeat", orjson.dumps(info.to_dict()), metrics, id=info.id, ttl_ms=round(ttl_s * 1000), plans=plans
        )

    async def deregister(self, engine_id: str) -> None:
        """Delete the heartbeat."""
        with redis_errors():
            await self._redis.delete(self.key("engine", engine_id))

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when work was queued, or after `timeout_s`."""
        await self._wake_ups.wait(timeout_s)

    async def wait_for_preview(self) -> None:
        """Return when a preview was offered, or may have been."""
        await self._preview_wake_ups.wait(None)

    async def _write_partial(self, job_id: str, epoch: int, partial: PartialImage) -> bool:
        place: dict[str, Argument] = {"id": job_id, "epoch": epoch, "image": partial.image, "index": partial.index}
        return bool(await self._scripts.run("partial_image", partial.data, orjson.dumps(partial.grid), **place))

    async def _write(self, script: str, claim: Claim, *blobs: str | bytes, **arguments: Argument) -> bool:
        return bool(await self._scripts.run(script, *blobs, id=claim.job_id, epoch=claim.epoch, **arguments))
