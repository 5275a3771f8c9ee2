"""Converting the dataclasses of `job.py` to JSON and raw images, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import orjson

from engine.jobs.job import (
    Claim,
    ImageResult,
    JobError,
    JobRecord,
    JobResult,
    JobSpec,
    JobState,
    Origin,
    Plan,
    Priority,
    SourceImages,
)

RECORD_FIELDS = ("state", "spec", "priority", "submitted_at", "deadline", "runs", "progress", "error", "owner", "notes")


def decode_record(job_id: str, values: Sequence[Any], position: int | None = None) -> JobRecord | None:
    """Return the record from the values of `RECORD_FIELDS`."""
    stored = {name: value for name, value in zip(RECORD_FIELDS, values, strict=True) if value is not None}
    if "state" not in stored:
        return None
    return JobRecord(
        id=job_id,
        state=JobState(stored["state"].decode()),
        spec=JobSpec.from_dict(orjson.loads(stored["spec"])),
        priority=cast(Priority, stored["priority"].decode()),
        submitted_at=int(stored["submitted_at"]),
        deadline_ms=int(stored["deadline"]),
        runs=int(stored["runs"]),
        progress=orjson.loads(stored.get("progress", b"{}")),
        error=JobError.from_dict(orjson.loads(stored["error"])) if "error" in stored else None,
        owner=stored.get("owner", b"").decode(),
        notes=orjson.loads(stored.get("notes", b"{}")),
        position=position,
    )


def decode_claim(reply: Sequence[Any]) -> Claim:
    """Return the claim from the reply of `claim.lua`."""
    job_id, epoch, runs, quarantined, spec, submitted_at, deadline, claimed_at, plans, origin = reply
    return Claim(
        job_id=job_id.decode(),
        epoch=epoch,
        spec=JobSpec.from_dict(orjson.loads(spec)),
        submitted_at=int(submitted_at),
        deadline_ms=int(deadline),
        claimed_at=claimed_at,
        runs=runs,
        plans={
            int(index): Plan.from_dict(orjson.loads(plan)) for index, plan in zip(plans[::2], plans[1::2], strict=True)
        },
        quarantined=bool(quarantined),
        origin=Origin.from_dict(orjson.loads(origin or b"{}")),  # an older API writes none
    )


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
        "images": [{"seed": image.seed, "plan": image.plan} for image in result.images],
        "prompt_tokens": result.prompt_tokens,
        "plan_tokens": result.plan_tokens,
        "source_tokens": result.source_tokens,
    }
    fields: list[str | bytes] = ["meta", orjson.dumps(meta)]
    for index, image in enumerate(result.images):
        fields += [f"image:{index}", image.data]
    return fields


def decode_result(stored: Mapping[Any, Any]) -> JobResult | None:
    """Return the result from its hash."""
    if b"meta" not in stored:
        return None
    meta = orjson.loads(stored[b"meta"])
    images = [
        ImageResult(stored[b"image:%d" % index], image["seed"], image["plan"])
        for index, image in enumerate(meta["images"])
    ]
    return JobResult(images, meta["prompt_tokens"], meta["plan_tokens"], meta.get("source_tokens", 0))
