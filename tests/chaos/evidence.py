"""What the journals of all engines prove together.

A write that began after a newer claim on its job was granted is stale, and must be refused.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

ENDS = ("commit", "fail")
SETTLING_S = 0.25  # an engine drops cancelled jobs with its next step, perhaps after claiming a quarantined one


@dataclass(frozen=True)
class Claimed:
    """A claim granted to an engine."""

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
    """A write, and whether it took effect."""

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
    """All journals, by job.

    Args:
        freed: when an engine had dropped a claim, by (job, epoch).
        hangs, integrity: by engine.
    """

    claims: dict[str, list[Claimed]] = field(default_factory=lambda: defaultdict(list))
    writes: dict[str, list[Written]] = field(default_factory=lambda: defaultdict(list))
    freed: dict[tuple[str, int], float] = field(default_factory=dict)
    hangs: dict[str, float] = field(default_factory=dict)
    integrity: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        """Read the journals in a folder, without the last line: a killed engine may have cut it off."""
        evidence = cls()
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                evidence._add(path.stem, *orjson.loads(line))
        for claims in evidence.claims.values():
            claims.sort(key=lambda claim: claim.epoch)
        return evidence

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
            if kind == "hand_over":  # a planner holds nothing of a planned job
                self.freed.setdefault((job, epoch), began)

    # --- faults ------------------------------------------------------------------------------------------------------

    def ended_twice(self) -> list[str]:
        """Return jobs of which more than one end took effect."""
        return [job for job, writes in self.writes.items() if sum(w.accepted and w.kind in ENDS for w in writes) > 1]

    def stale(self, *, accepted: bool) -> list[Written]:
        """Return the stale writes that took effect, or those that were refused."""
        return [
            write
            for job, writes in self.writes.items()
            for write in writes
            if write.accepted == accepted and self._newer(job, write)
        ]

    def _newer(self, job: str, write: Written) -> bool:
        return any(claim.epoch > write.epoch and claim.at < write.began for claim in self.claims.get(job, ()))

    def planned_again(self) -> list[str]:
        """Return jobs with an image that was planned although its plan was checkpointed or handed over."""
        jobs = []
        for job, writes in self.writes.items():
            accepted = [write for write in writes if write.accepted]
            kept = [write.detail for write in accepted if write.kind == "checkpoint"]
            kept += [image for write in accepted if write.kind == "hand_over" for image in write.detail]
            if len(kept) > len(set(kept)):
                jobs.append(job)
        return jobs

    def quarantined_in_company(self) -> list[str]:
        """Return quarantined jobs that ran while another job was on their engine."""
        by_engine: dict[str, list[Claimed]] = defaultdict(list)
        for claim in self.all_claims():
            by_engine[claim.engine].append(claim)
        return [
            quarantined.job
            for claims in by_engine.values()
            for quarantined in claims
            if quarantined.quarantined
            and any(self._overlap(quarantined, other) for other in claims if other is not quarantined)
        ]

    def _overlap(self, one: Claimed, other: Claimed) -> bool:
        first, second = sorted((one, other), key=lambda claim: claim.at)
        return self.freed.get((first.job, first.epoch), float("inf")) > second.at + SETTLING_S

    # --- counts -------------------------------------------------------------------------------------------------------

    def all_claims(self) -> Iterable[Claimed]:
        return (claim for claims in self.claims.values() for claim in claims)

    def runs_of(self, prompt: str) -> list[Claimed]:
        """Return all claims on the jobs of a prompt, oldest first."""
        return sorted((c for job in self.jobs_of(prompt) for c in self.claims[job]), key=lambda claim: claim.at)

    def resumed(self) -> int:
        """Count images that a run began with the plan of an earlier one."""
        return sum(len(claim.known) for claim in self.all_claims())

    def jobs_of(self, prompt: str) -> set[str]:
        """Return the jobs that engines got with a prompt."""
        return self._by_prompt().get(prompt, set())

    def _by_prompt(self) -> dict[str, set[str]]:
        if not hasattr(self, "_prompts"):
            self._prompts: dict[str, set[str]] = defaultdict(set)
            for claim in self.all_claims():
                self._prompts[claim.prompt].add(claim.job)
        return self._prompts

    def next_claim(self, job: str, after: float) -> Claimed | None:
        """Return the first claim on a job after a time."""
        return min((claim for claim in self.claims.get(job, ()) if claim.at > after), key=lambda c: c.at, default=None)

    def first_claim(self, after: float) -> Claimed | None:
        """Return the first claim on any job after a time."""
        return min((claim for claim in self.all_claims() if claim.at > after), key=lambda c: c.at, default=None)
