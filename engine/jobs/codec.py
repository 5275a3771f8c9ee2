"""The dataclasses of `job.py` as JSON and raw images."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import orjson
from pydantic import TypeAdapter
from redis.exceptions import ResponseError

from engine.errors import UnreadableJob
from engine.geometry import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MIN_SIDE
from engine.jobs.job import (
    Claim,
    EngineInfo,
    HandedOver,
    JobError,
    JobRecord,
    JobSpec,
    JobState,
    Origin,
    Plan,
    PreviewOffer,
    Priority,
    SourceImages,
    TokenGrid,
)
from engine.jobs.results import ImageResult, JobResult, StoredImage, StoredResult
from engine.observability.logs import event, where

R = TypeVar("R")

logger = logging.getLogger("glimmer.queue")

HANDED_OVER = b"handed_over"  # field of `plans:{id}`

RECORD_FIELDS = ("state", "spec", "priority", "submitted_at", "deadline", "runs", "progress", "error", "owner", "notes")


@contextmanager
def reading(job_id: str) -> Iterator[None]:
    """Raise `UnreadableJob` for damaged data, which fails one job only."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        event(logger, "job_unreadable", logging.ERROR, job=job_id, error=type(error).__name__, where=where(error))
        raise UnreadableJob(f"job {job_id} cannot be read") from error
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        event(logger, "job_unreadable", logging.ERROR, job=job_id, error="WRONGTYPE")
        raise UnreadableJob(f"job {job_id} cannot be read") from error


def decode_record(job_id: str, values: Sequence[Any], position: int | None = None) -> JobRecord | None:
    """Decode the values of `RECORD_FIELDS`."""
    stored = {name: value for name, value in zip(RECORD_FIELDS, values, strict=True) if value is not None}
    if "state" not in stored:
        return None
    return JobRecord(
        id=job_id,
        state=JobState(stored["state"].decode()),
        spec=_decode_spec(stored["spec"]),
        priority=cast(Priority, stored["priority"].decode()),
        submitted_at=int(stored["submitted_at"]),
        deadline_ms=int(stored["deadline"]),
        runs=int(stored["runs"]),
        progress=_decode_object(stored.get("progress", b"{}")),
        error=_checked(JobError.from_dict(_decode_object(stored["error"]))) if "error" in stored else None,
        owner=stored.get("owner", b"").decode(),
        notes=_decode_object(stored.get("notes", b"{}")),
        position=position,
    )


def decode_claim(reply: Sequence[Any], planner: str) -> Claim:
    """Decode a reply of `claim.lua`, without plans of another planner unless it handed them over."""
    job_id, epoch, runs, quarantined, spec, submitted_at, deadline, claimed_at, stored, origin = reply
    plans = dict(zip(stored[::2], stored[1::2], strict=True))
    handed_over = _decode_handed_over(plans.pop(HANDED_OVER)) if HANDED_OVER in plans else None
    return Claim(
        job_id=job_id.decode(),
        epoch=epoch,
        spec=_decode_spec(spec),
        submitted_at=int(submitted_at),
        deadline_ms=int(deadline),
        claimed_at=claimed_at,
        runs=runs,
        plans=_decode_plans(plans, "" if handed_over else planner),
        quarantined=bool(quarantined),
        origin=_checked(Origin.from_dict(_decode_object(origin or b"{}"))),  # an older API writes none
        handed_over=handed_over,
    )


def decode_preview(reply: Sequence[Any]) -> PreviewOffer:
    """Decode a reply of `take_preview.lua`."""
    job_id, epoch, image, grid, spec, deadline, now = reply
    return PreviewOffer(
        job_id.decode(),
        epoch,
        image,
        _decode_grid(grid),
        _decode_spec(spec),
        (int(deadline) - now) / 1000,
    )


def encode_hand_over(plans: Mapping[int, Plan], handed_over: HandedOver, planner: str) -> list[str | bytes]:
    """Return the fields of `plans:{id}` and their values in turn."""
    fields: list[str | bytes] = [HANDED_OVER, orjson.dumps(handed_over.to_dict())]
    for index, plan in plans.items():
        fields += [str(index), encode_plan(plan, planner)]
    return fields


def encode_plan(plan: Plan, planner: str) -> bytes:
    """Return a checkpoint, which names its planner."""
    return orjson.dumps(plan.to_dict() | ({"planner": planner} if planner else {}))


def _decode_plans(stored: Mapping[bytes, bytes], planner: str) -> dict[int, Plan]:
    plans: dict[int, Plan] = {}
    for index, document in stored.items():
        data = _decode_object(document)
        if data.get("planner", planner) == planner or not planner:  # an older engine writes none
            plans[int(index)] = _decode_plan(data)
    return plans


def decode_cached_plan(document: bytes | str) -> Plan | None:
    """Return the plan, None if damaged: it is made again."""
    try:
        return _decode_plan(_decode_object(document))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def decode_engine(document: bytes) -> EngineInfo | None:
    """Return the engine, None if its heartbeat is damaged."""
    try:
        return _checked(EngineInfo.from_dict(_decode_object(document)))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _decode_plan(data: dict[str, Any]) -> Plan:
    plan = _checked(Plan.from_dict(data))
    if plan.preview:
        _check_size(plan.preview)
    _check_size(plan)
    return plan


def _decode_grid(document: bytes) -> TokenGrid:
    grid = _checked(TokenGrid.from_dict(_decode_object(document)))
    _check_size(grid)
    return grid


def _decode_handed_over(document: bytes) -> HandedOver:
    handed_over = _checked(HandedOver.from_dict(_decode_object(document)))
    for grid in handed_over.sources:
        _check_size(grid)
    return handed_over


def _check_size(grid: TokenGrid | Plan) -> None:
    if len(grid.tokens) != grid.rows * grid.cols:
        raise ValueError("the number of tokens is not rows * cols")


def _decode_spec(document: bytes) -> JobSpec:
    spec = _checked(JobSpec.from_dict(_decode_object(document)))
    sides_fit = all(MIN_SIDE <= side <= MAX_SIDE for side in (spec.width, spec.height))
    if not (sides_fit and 1 <= spec.n <= MAX_IMAGES and spec.num_inference_steps <= MAX_STEPS):
        raise ValueError("the job is larger than any that is accepted")
    return spec


def _decode_object(document: bytes | str) -> dict[str, Any]:
    data = orjson.loads(document)
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data


@functools.cache
def _adapter(record_type: type[R]) -> TypeAdapter[R]:
    return TypeAdapter(record_type)


def _checked(record: R) -> R:
    """Raise ValueError if a field has another type than declared."""
    _adapter(type(record)).validate_python(record)
    return record


def encode_sources(sources: SourceImages | None) -> list[str | bytes]:
    """Return the hash's fields and values in turn."""
    if sources is None:
        return []
    fields: list[str | bytes] = []
    for index, file in enumerate(sources.files):
        fields += [str(index), file]
    return fields if sources.overlay is None else [*fields, "overlay", sources.overlay]


def decode_sources(stored: Mapping[Any, Any]) -> SourceImages | None:
    """Return the source images from their hash."""
    if not stored:
        return None
    count = len(stored) - (b"overlay" in stored)
    return SourceImages([stored[b"%d" % index] for index in range(count)], stored.get(b"overlay"))


def encode_result(result: JobResult) -> list[str | bytes]:
    """Return the hash's fields and values in turn."""
    meta = {
        "images": [_describe(image) for image in result.images],
        "prompt_tokens": result.prompt_tokens,
        "plan_tokens": result.plan_tokens,
        "source_tokens": result.source_tokens,
    }
    fields: list[str | bytes] = ["meta", orjson.dumps(meta)]
    for index, image in enumerate(result.images):
        if image.stored is None:
            fields += [f"image:{index}", image.data]
    return fields


def _describe(image: ImageResult) -> dict[str, Any]:
    described: dict[str, Any] = {"seed": image.seed, "plan": image.plan}
    if image.stored is not None:
        described["object"] = {"key": image.stored.key, "size": image.stored.size}
    return described


def decode_stored_result(meta: bytes, *images: bytes | int) -> StoredResult:
    """Return the result from the reply of `stored_result.lua`."""
    fields = orjson.loads(meta)
    described = fields["images"]
    kept = images or [None] * len(described)  # all images of a result are in one place
    stored = [_stored_image(*each) for each in zip(described, kept, strict=True)]
    return StoredResult(stored, fields["prompt_tokens"], fields["plan_tokens"], fields.get("source_tokens", 0))


def _stored_image(described: dict[str, Any], image: bytes | int | None) -> StoredImage:
    seed, plan = described["seed"], described["plan"]
    if image is None:
        return StoredImage(described["object"]["size"], seed, plan, key=described["object"]["key"])
    return StoredImage(len(image), seed, plan, image) if isinstance(image, bytes) else StoredImage(image, seed, plan)
