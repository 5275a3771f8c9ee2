"""Journal of an engine process: every claim and write, one JSON array per line.

Each line is written by one system call, so a SIGKILL loses at most one. Times are `time.monotonic()` seconds, which all
processes of a machine share.

    [t, "claim", job, epoch, began, runs, quarantined, [indices of known plans], prompt]
    [t, kind, job, epoch, began, accepted, detail]      kind: renew progress checkpoint partial commit fail
                                                        release hand_over
    [t, "freed", job, epoch]                            the engine holds nothing of the job any more
    [t, "hangs"]                                        a step began that will not end
    [t, "integrity", error]                             after a drain; empty if nothing leaked
"""

import os
import time
from collections.abc import Awaitable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from engine.jobs.consumer import JobConsumer
from engine.jobs.job import Claim, FreeCapacity, JobError, Plan, TokenGrid
from engine.jobs.results import JobResult, PartialImage


class Journal:
    """The journal of one process."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *facts: Any) -> None:
        """Append a line that begins with the time."""
        os.write(self._file, orjson.dumps([time.monotonic(), *facts]) + b"\n")


class WitnessedConsumer(JobConsumer):
    """A consumer that records its claims and writes in a journal.

    The times around a write reveal a stale one that took effect: it began after a newer claim of the job was granted.
    """

    journal: Journal

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        began = time.monotonic()
        claim = await super().claim(consumer, free)
        if claim is not None:
            known = sorted(claim.plans)
            self.journal.write(
                "claim", claim.job_id, claim.epoch, began, claim.runs, claim.quarantined, known, claim.spec.prompt
            )
        return claim

    async def renew(self, consumer: str, claims: Iterable[Claim]) -> list[Claim]:
        began = time.monotonic()
        lost = await super().renew(consumer, claims)
        for claim in lost:
            self.journal.write("renew", claim.job_id, claim.epoch, began, False, None)
        return lost

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        return await self._witness("progress", claim, super().progress(claim, progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        return await self._witness("checkpoint", claim, super().checkpoint_plan(claim, index, plan), index)

    async def hand_over(
        self, consumer: str, claim: Claim, plans: Mapping[int, Plan], prompt_tokens: int, sources: list[TokenGrid]
    ) -> bool:
        call = super().hand_over(consumer, claim, plans, prompt_tokens, sources)
        return await self._witness("hand_over", claim, call, sorted(plans))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        return await self._witness("partial", claim, super().partial_image(claim, partial))

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        return await self._witness("commit", claim, super().commit(claim, result))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        return await self._witness("fail", claim, super().fail(claim, error))

    async def requeue(self, consumer: str, claim: Claim) -> bool:
        return await self._witness("release", claim, super().requeue(consumer, claim))

    async def _witness(self, kind: str, claim: Claim, write: Awaitable[bool], detail: Any = None) -> bool:
        began = time.monotonic()
        accepted = await write
        self.journal.write(kind, claim.job_id, claim.epoch, began, accepted, detail)
        return accepted
