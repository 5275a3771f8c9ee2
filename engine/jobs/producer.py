"""The API's side of the job queue."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import redis.asyncio

from engine.errors import (
    GlimmerError,
    KeyReused,
    QueueFull,
    QueueReadOnly,
    ResultsFull,
    SourcesFull,
    StoreMissing,
    TooManyJobs,
    TooMuchKept,
)
from engine.jobs.base import QueueBase
from engine.jobs.codec import (
    RECORD_FIELDS,
    decode_engine,
    decode_record,
    decode_stored_result,
    encode_sources,
    reading,
)
from engine.jobs.connection import redis_errors, retry_while_away
from engine.jobs.job import (
    EngineInfo,
    JobRecord,
    JobSpec,
    JobState,
    MemoryUse,
    Origin,
    Priority,
    QueueStats,
    SourceImages,
    Submitted,
)
from engine.jobs.result_size import max_result_size
from engine.jobs.result_store import ResultStore
from engine.jobs.results import StoredPartial, StoredResult
from engine.jobs.scripts import Argument
from engine.observability.logs import event

logger = logging.getLogger("glimmer.queue")

_IMAGE_READS = 4  # at once: while a reply is parsed, it takes three times its size

_DELIVERED_TTL_S = 5.0  # time to ask again after a lost response

_REFUSALS: dict[bytes, tuple[type[GlimmerError], str]] = {  # by the reply of `submit.lua`
    b"full": (QueueFull, "{max_queue} jobs are waiting already"),
    b"full of sources": (SourcesFull, "the jobs in the queue have {max_source_bytes} bytes of sources, or nearly so"),
    b"full of results": (ResultsFull, "results and jobs take all the memory for them, or nearly so"),
    b"too much": (TooMuchKept, "results and jobs of this owner take all the memory for one owner, or nearly so"),
    b"too many": (TooManyJobs, "{max_owned} jobs of this owner are waiting or running already"),
    b"reused": (KeyReused, "this idempotency key came with another request before"),
}


class JobProducer(QueueBase):
    """Submits jobs and reads what becomes of them.

    Args:
        min_replicas: replicas that must have a job before it counts as submitted.
    """

    def __init__(self, redis: redis.asyncio.Redis, *, min_replicas: int = 0, **options: Any) -> None:
        super().__init__(redis, **options)
        self._min_replicas = min_replicas
        self._image_reads = asyncio.Semaphore(_IMAGE_READS)

    async def submit(
        self,
        spec: JobSpec,
        *,
        job_id: str,
        timeout_s: float,
        priority: Priority,
        max_queue: int,
        source_images: SourceImages | None = None,
        notes: dict[str, Any] | None = None,
        ended_notes: dict[str, Any] | None = None,
        owner: str = "",
        max_owned: int | None = None,
        max_source_bytes: int | None = None,
        max_result_bytes: int | None = None,
        max_kept_bytes: int | None = None,
        owner_parts: int | None = None,
        url_copies: bool = False,
        idempotency_key: str = "",
        fingerprint: str = "",
        origin: Origin = Origin(),
        dry_run: bool = False,
        api_id: str = "",
    ) -> Submitted:
        """Queue a job. A known id is ignored: repeat a submit without a reply.

        Args:
            ended_notes: replace `notes` when the job ends without a result.
            max_queue: waiting jobs of both priorities.
            max_owned: live jobs of the owner.
            max_source_bytes: of all live jobs; one edit always fits.
            max_result_bytes: of records and results, live jobs by their bounds; any job fits where little is kept.
            max_kept_bytes: of both.
            owner_parts: divides these three for one owner.
            url_copies: the images are stored again, to serve them by URL.
            idempotency_key: of one owner. Leads to its first job, unless that ended without a result.
            fingerprint: of the request, without spaces.
            dry_run: queue nothing.
            api_id: the API process whose end cancels the job.

        Raises:
            QueueFull, SourcesFull, ResultsFull, TooManyJobs, TooMuchKept, KeyReused: nothing was queued.
            QueueReadOnly: queued, on fewer than `min_replicas` replicas.
        """
        job_format = spec.format
        parts = (spec.to_dict(), notes or {}, origin.to_dict(), spec.ended())
        copies = 1 + url_copies if self.result_store is None else 0
        documents = [*map(orjson.dumps, parts), orjson.dumps(ended_notes) if ended_notes else b""]
        arguments: dict[str, Argument] = {
            "id": job_id,
            "priority": priority,
            "images": spec.n,
            "kv_tokens": spec.plan_tokens + spec.prompt_tokens_bound,
            "source_tokens": spec.source_tokens,
            "work": spec.pixel_steps,
            "timeout_ms": round(timeout_s * 1000),
            "owner": owner,
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
            "max_queue": max_queue,
            "max_owned": max_owned,
            "source_bytes": source_images.size if source_images else 0,
            "max_source_bytes": max_source_bytes,
            "dry_run": dry_run,
            "format": job_format if job_format > 1 else None,
            "api": api_id or None,
            "result_bytes": sum(map(len, documents)) + max_result_size(spec, copies=copies),
            "max_result_bytes": max_result_bytes,
            "max_kept_bytes": max_kept_bytes,
            "owner_parts": owner_parts,
            "url_copies": int(url_copies) or None,
        }
        reply = await self._submit([*documents, *encode_sources(source_images)], arguments)
        if isinstance(reply, list):
            _, now, position = reply
            deadline_ms, state = now + round(timeout_s * 1000), JobState.QUEUED
            record = JobRecord(job_id, state, spec, priority, now, deadline_ms, owner=owner, notes=notes or {})
            return Submitted(job_id, replace(record, position=position))
        if reply in _REFUSALS:
            error, message = _REFUSALS[reply]
            raise error(message.format_map(arguments))
        return Submitted(reply.removeprefix(b"attached ").decode() if reply.startswith(b"attached ") else job_id)

    async def _submit(self, blobs: list[Any], arguments: dict[str, Argument]) -> Any:
        if not self._min_replicas or arguments["dry_run"]:
            return await self._scripts.run("submit", *blobs, **arguments)
        reply, reached = await self._scripts.run_replicated("submit", self._min_replicas, *blobs, **arguments)
        is_refused = isinstance(reply, bytes) and reply in _REFUSALS
        if not is_refused and reached < self._min_replicas:
            # Perhaps a former master: let the next calls ask where the present one is.
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise QueueReadOnly(f"{reached} of {self._min_replicas} replicas have the job")
        return reply

    async def cancel(self, job_id: str) -> bool:
        """Cancel a live job; return whether this call did."""
        return bool(await self._scripts.run("end_job", id=job_id, state=JobState.CANCELLED.value))

    async def discard(self, job_id: str) -> bool:
        """Cancel a job, even with its submit in flight, and delete its result."""
        return bool(await self._scripts.run("discard", id=job_id))

    async def ended_among(self, job_ids: Sequence[str]) -> dict[str, JobState | None]:
        """Return the states of ended jobs, None for unknown ones; expire jobs past their deadline.

        Blocks Redis: pass hundreds of ids.
        """
        reply = await self._scripts.run("ended_among", ids=list(job_ids))
        pairs = zip(reply[::2], reply[1::2], strict=True)
        return {job_id.decode(): JobState(state.decode()) if state else None for job_id, state in pairs}

    async def api_heartbeat(self, api_id: str) -> None:
        """Report that an API process lives."""
        await self._scripts.run("api_heartbeat", id=api_id)

    async def get(self, job_id: str, *, outage_timeout_s: float = 0.0) -> JobRecord | None:
        """Return the record, None `result_ttl_s` after the end; raise `UnreadableJob` if damaged."""

        async def read() -> JobRecord | None:
            with reading(job_id):
                async with self._redis.pipeline(transaction=False) as pipe:
                    pipe.hmget(self.key("job", job_id), list(RECORD_FIELDS))
                    pipe.zrank(self.key("waiting"), job_id)
                    values, position = await pipe.execute()
                return decode_record(job_id, values, position)

        return await retry_while_away(read, outage_timeout_s)

    async def stored_result(self, job_id: str, max_bytes: int) -> StoredResult | None:
        """Return the result, with its images if they are small; None once discarded or expired.

        Raises:
            UnreadableJob: it is damaged.
        """
        with reading(job_id):
            reply = await self._scripts.run("stored_result", id=job_id, max_bytes=max_bytes)
            return None if reply is None else decode_stored_result(*reply)

    async def result_image(self, job_id: str, index: int, key: str | None = None) -> bytes | None:
        """Return one image of a result, None once discarded or expired.

        Args:
            key: of object storage.
        """
        if key is not None:
            return await self._require_store().get(key)
        return await self._image(self.key("result", job_id), f"image:{index}")

    async def image_link(self, key: str) -> str:
        """Return a presigned URL of an image in object storage, valid for `result_ttl_s`."""
        return await self._require_store().link(key, self.result_ttl_s)

    def _require_store(self) -> ResultStore:
        if self.result_store is None:
            event(logger, "result_store_missing", logging.ERROR, setting="GLIMMER_RESULT_STORE")
            raise StoreMissing("engines have a result store, but this API has none: set GLIMMER_RESULT_STORE")
        return self.result_store

    async def partial_data(self, job_id: str, partial: StoredPartial) -> bytes | None:
        """Return the data of a partial image, None once expired."""
        return await self._image(self.key("partials", job_id), f"{partial.image}:{partial.index}")

    async def _image(self, key: str, field: str) -> bytes | None:
        async with self._image_reads:
            with redis_errors():
                return await self._redis.hget(key, field)  # type: ignore[misc]

    async def shorten_ttl(self, job_id: str) -> None:
        """Keep record and result, maybe megabytes, for `_DELIVERED_TTL_S`."""
        ttl_ms = min(round(1000 * _DELIVERED_TTL_S), self._result_ttl_ms)
        await self._scripts.run("shorten_ttl", id=job_id, ttl_ms=ttl_ms)

    async def share_file(self, job_id: str, token: str, data: bytes, media_type: str) -> None:
        """Store a file of a job's result for `result_ttl_s`, once."""
        await self._scripts.run("share_file", data, media_type, id=job_id, token=token)

    async def shared_file_info(self, token: str) -> tuple[str | None, int]:
        """Return the media type and size of a shared file, None and 0 once expired."""
        key = self.key("file", token)
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hget(key, "type")
                pipe.hstrlen(key, "data")
                media_type, size = await pipe.execute()
        return media_type and media_type.decode(), size

    async def shared_file(self, token: str) -> bytes | None:
        """Return the data of a shared file, None once expired."""
        return await self._image(self.key("file", token), "data")

    async def takes_writes(self) -> bool:
        """Return whether Redis takes writes."""
        try:
            with redis_errors():
                await self._redis.set(self.key("probe"), b"", px=1000)
        except QueueReadOnly:
            return False
        return True

    async def memory_use(self) -> MemoryUse:
        """Return what counts against `maxmemory`."""
        with redis_errors():
            memory = await self._redis.info("memory")
        used = memory["used_memory"] - memory.get("mem_not_counted_for_evict", 0)
        return MemoryUse(used, memory["maxmemory"] or None)

    async def stats(self) -> QueueStats:
        """Return the counts."""
        return QueueStats(*await self._scripts.run("stats"))

    async def engines(self) -> list[EngineInfo]:
        """Return the live engines by id, without unreadable heartbeats."""
        live = (decode_engine(info) for info in (await self._heartbeats("info")).values())
        return [engine for engine in live if engine is not None]

    async def last_engine(self) -> EngineInfo | None:
        """Return the last ready engine that planned, living or not."""
        with redis_errors():
            info: Any = await self._redis.get(self.key("last_engine"))
        return decode_engine(info) if info else None

    async def engine_metrics(self) -> dict[str, str]:
        """Return Prometheus texts by engine id."""
        return {engine: text.decode(errors="replace") for engine, text in (await self._heartbeats("metrics")).items()}

    async def _heartbeats(self, field: str) -> dict[str, bytes]:
        reply = await self._scripts.run("engines", field=field)
        return {engine.decode(): value for engine, value in zip(reply[::2], reply[1::2], strict=True)}
