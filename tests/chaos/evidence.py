"""What the journals of all engines prove, taken together.

A claim counts from when it was granted, a write from when it began. A write that began after a newer claim on its job
was granted is stale; taking effect would be the fault that epochs are there to prevent.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

ENDS = ("commit", "fail")
SETTLING_S = 0.25  # a worker may draw a suspect before its engine has dropped, in its next step, what was cancelled


@dataclass(frozen=True)
class Claimed:
    """A claim that an engine got to know of."""

    at: float
    engine: str
    job: str
    epoch: int
    runs: int
    quarantined: bool
    known: list[int]
    prompt: str


@dataclass(frozen=True)
class Written:
    """A write, and whether Redis let it take effect."""

    engine: str
    kind: str
    job: str
    epoch: int
    began: float
    ended: float
    accepted: bool
    detail: Any


@dataclass
class Evidence:
    """All journals, by job. `freed`: when an engine had let go of a claim, by (job, epoch). `hangs` and `integrity` by
    engine."""

    claims: dict[str, list[Claimed]] = field(default_factory=lambda: defaultdict(list))
    writes: dict[str, list[Written]] = field(default_factory=lambda: defaultdict(list))
    freed: dict[tuple[str, int], float] = field(default_factory=dict)
    hangs: dict[str, float] = field(default_factory=dict)
    integrity: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """From the journals in a folder. The line that a killed engine was writing may be cut off."""
        found = cls()
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                found._add(path.stem, *orjson.loads(line))
        for claims in found.claims.values():
            claims.sort(key=lambda claim: claim.epoch)
        return found

    def _add(self, engine: str, at: float, kind: str, *facts: Any) -> None:
        if kind == "claim":
            job, epoch, _, runs, quarantined, known, prompt = facts
            self.claims[job].append(Claimed(at, engine, job, epoch, runs, quarantined, known, prompt))
        elif kind == "freed":
            self.freed[facts[0], facts[1]] = at
        elif kind == "hangs":
            self.hangs[engine] = at
        elif kind == "integrity":
            self.integrity[engine] = facts[0]
        else:
            job, epoch, began, accepted, detail = facts
            self.writes[job].append(Written(engine, kind, job, epoch, began, at, accepted, detail))

    # --- what must not be ---------------------------------------------------------------------------------------------

    def ended_twice(self) -> list[str]:
        """Jobs for which more than one end took effect."""
        return [job for job, writes in self.writes.items() if sum(w.accepted and w.kind in ENDS for w in writes) > 1]

    def stale(self, *, accepted: bool) -> list[Written]:
        """Stale writes that took effect, or those that were refused."""
        return [
            write
            for job, writes in self.writes.items()
            for write in writes
            if write.accepted == accepted and self._newer(job, write)
        ]

    def _newer(self, job: str, write: Written) -> bool:
        return any(claim.epoch > write.epoch and claim.at < write.began for claim in self.claims.get(job, ()))

    def planned_again(self) -> list[str]:
        """Jobs an image of which was planned although a plan of it had been kept."""
        found = []
        for job, writes in self.writes.items():
            kept = [write.detail for write in writes if write.kind == "checkpoint" and write.accepted]
            if len(kept) > len(set(kept)):
                found.append(job)
        return found

    def suspects_in_company(self) -> list[str]:
        """Jobs that were to run alone and did not: another job was on their engine at the time."""
        by_engine: dict[str, list[Claimed]] = defaultdict(list)
        for claim in self.all_claims():
            by_engine[claim.engine].append(claim)
        return [
            suspect.job
            for claims in by_engine.values()
            for suspect in claims
            if suspect.quarantined and any(self._overlap(suspect, other) for other in claims if other is not suspect)
        ]

    def _overlap(self, one: Claimed, other: Claimed) -> bool:
        first, second = sorted((one, other), key=lambda claim: claim.at)
        return self.freed.get((first.job, first.epoch), float("inf")) > second.at + SETTLING_S

    # --- what may be counted ------------------------------------------------------------------------------------------

    def all_claims(self) -> Iterable[Claimed]:
        return (claim for claims in self.claims.values() for claim in claims)

    def runs_of(self, prompt: str) -> list[Claimed]:
        """All claims on the jobs of this prompt, oldest first."""
        return sorted((c for job in self.jobs_of(prompt) for c in self.claims[job]), key=lambda claim: claim.at)

    def resumed(self) -> int:
        """Images that a later run of their job began with the plan of an earlier one."""
        return sum(len(claim.known) for claim in self.all_claims())

    def jobs_of(self, prompt: str) -> set[str]:
        """Jobs that engines got with this prompt."""
        return self._by_prompt().get(prompt, set())

    def _by_prompt(self) -> dict[str, set[str]]:
        if not hasattr(self, "_prompts"):
            self._prompts: dict[str, set[str]] = defaultdict(set)
            for claim in self.all_claims():
                self._prompts[claim.prompt].add(claim.job)
        return self._prompts

    def next_claim(self, job: str, after: float) -> Claimed | None:
        """The first claim on a job after a moment."""
        return min((claim for claim in self.claims.get(job, ()) if claim.at > after), key=lambda c: c.at, default=None)

    def first_claim(self, after: float) -> Claimed | None:
        """The first claim on any job after a moment."""
        return min((claim for claim in self.all_claims() if claim.at > after), key=lambda c: c.at, default=None)
