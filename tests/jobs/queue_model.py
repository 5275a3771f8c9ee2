"""A model of the queue's visible behaviour, without Redis, leases and bytes."""

from dataclasses import dataclass, field, replace

from engine.errors import KeyReused, QueueFull, SourcesFull, TooManyJobs
from engine.jobs.job import FreeCapacity, Plan, Priority
from tests.jobs.helpers import spec

CAP, OWNED_CAP, SOURCES_CAP, MAX_RUNS, MAX_ABSOLVED = 2, 2, 8, 10, 3
STAGES = ("all", "plan", "render")
QUEUES = ("interactive", "batch", "render:interactive", "render:batch")


@dataclass(frozen=True)
class Death:
    """A confirmed run that its engine did not end."""

    engine: str | None  # may take it back
    alone: bool
    phase: str = ""
    step: int = 0
    steps: int = 0

    def is_like(self, other: "Death") -> bool:
        """Return whether both came at about the same step; none was reported where a job had hardly begun."""
        slack = max(2, self.steps / 10, other.steps / 10)
        if self.phase == other.phase:
            return abs(self.step - other.step) <= slack
        return "" in (self.phase, other.phase) and max(self.step, other.step) <= slack


@dataclass
class Job:
    """A job and its stream entry."""

    id: str
    priority: Priority
    images: int
    late: bool  # its deadline has passed
    sources: int  # bytes, and tokens
    owner: str = ""
    api: str = ""
    format: int = 1
    orphaned: bool = False  # its API was not seen for long
    steps: int = 1
    state: str = "queued"
    runs: int = 0  # confirmed ones
    epoch: int = 0
    confirmed: bool = False  # whether the claim of this epoch is a run
    alone: bool = False
    deaths: dict[int, Death] = field(default_factory=dict)  # by epoch
    lapses: dict[int, str | None] = field(default_factory=dict)  # engine of a lapsed claim, by epoch
    absolved: int = 0
    engine: str | None = None
    stage: str = "plan"  # "render" from the hand-over on
    delivered: bool = False
    lapsed: bool = False  # requeued, or its lease has lapsed
    has_result: bool = False
    progress: dict[str, str | int] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)
    partials: set[str] = field(default_factory=set)

    @property
    def work(self) -> int:
        return spec(n=self.images, num_inference_steps=self.steps).pixel_steps

    @property
    def live(self) -> bool:
        return self.state in ("queued", "running")

    @property
    def death(self) -> Death | None:
        """Return what the end of its engine is now."""
        if self.state != "running" or not self.confirmed:
            return None
        progress = self.progress or ({"phase": "rendering"} if self.stage == "render" else {})
        return Death(self.engine, self.alone, **progress)  # type: ignore[arg-type]

    @property
    def queue(self) -> str:
        """Return the name of its queue."""
        return f"render:{self.priority}" if self.stage == "render" else self.priority

    @property
    def known_deaths(self) -> list[Death]:
        """Return its deaths, with that of a lapsed claim."""
        return [*self.deaths.values(), *([self.death] if self.lapsed and self.death else [])]

    @property
    def is_given_up(self) -> bool:
        alone = [death for death in self.known_deaths if death.alone]
        groups = [[other for other in alone if one.is_like(other)] for one in alone]
        return self.runs >= MAX_RUNS or any(
            len(group) >= 3 or sum(death.engine is None for death in group) >= 2 for group in groups
        )

    def confirm(self) -> None:
        """Renew the claim."""
        self.runs += not self.confirmed
        self.confirmed, self.lapsed = True, False

    def forgive(self, engine: str) -> bool:
        """Take back the deaths of an engine's lapsed claims; return whether there are any."""
        forgiven = [epoch for epoch in self.deaths if self.lapses.get(epoch) == engine]
        for epoch in forgiven:
            del self.deaths[epoch]
        self.runs -= len(forgiven)
        return bool(forgiven)

    def absolve(self, epoch: int, engine: str) -> None:
        """Take the death of an engine back that lives."""
        if epoch in self.deaths and self.deaths[epoch].engine == engine and self.absolved < MAX_ABSOLVED:
            del self.deaths[epoch]
            self.runs -= 1
            self.absolved += 1

    def surrender(self, *, blame: bool) -> None:
        """End the claim with its engine."""
        if self.death and blame:
            self.deaths[self.epoch] = replace(self.death, engine=None)
        self.runs -= self.confirmed and not blame

    def fits(self, free: FreeCapacity) -> bool:
        if free.idle:
            return True
        cost = spec(n=self.images, num_sources=int(self.sources > 0), source_tokens=self.sources)
        return (
            not self.known_deaths
            and self.images <= free.images
            and (self.stage == "render" or cost.plan_tokens + cost.prompt_tokens_bound <= free.kv_tokens)
            and self.sources <= free.source_tokens
        )


@dataclass
class Model:
    """Live jobs by stream, oldest first.

    Args:
        overtaken: work and number of interactive jobs claimed while the first batch job waited, by stage of engines.
    """

    streams: dict[str, list[Job]] = field(default_factory=lambda: {queue: [] for queue in QUEUES})
    jobs: list[Job] = field(default_factory=list)
    keys: dict[str, tuple[str, Job]] = field(default_factory=dict)  # idempotency key: fingerprint, job
    overtaken: dict[str, tuple[int, int]] = field(default_factory=lambda: dict.fromkeys(STAGES, (0, 0)))
    rival: Job | None = None  # the first interactive job at the last claim, if a batch job waited, too
    heard: bool = False  # heartbeats have arrived without a gap
    dead_lettered: int = 0
    cleared: list[Job] = field(default_factory=list)  # ended by the last claim

    def count(self, state: str) -> int:
        return sum(job.state == state for job in self.jobs)

    def owned(self, owner: str) -> set[str]:
        return {job.id for job in self.jobs if job.live and job.owner == owner}

    @property
    def sources(self) -> int:
        return sum(job.sources for job in self.jobs if job.live)

    def submit(self, job: Job, key: str, fingerprint: str) -> Job | type[Exception]:
        """Return the job of a submit, this or an earlier one, or the error that refuses it."""
        known = self.keys.get(key)
        if known and known[0] != fingerprint:
            return KeyReused
        if known and (known[1].live or known[1].has_result):
            return known[1]
        if self.count("queued") >= CAP:
            return QueueFull
        if job.sources and self.sources and self.sources + job.sources > SOURCES_CAP:
            return SourcesFull
        if len(self.owned(job.owner)) >= OWNED_CAP:
            return TooManyJobs
        if key:
            self.keys[key] = fingerprint, job
        self.streams[job.queue].append(job)
        self.jobs.append(job)
        return job

    def end(self, job: Job, state: str) -> None:
        job.state = state
        self.streams[job.queue].remove(job)

    def requeue(self, job: Job) -> None:
        job.state, job.lapsed, job.engine, job.progress = "queued", True, None, {}

    def hand_over(self, job: Job) -> None:
        """Move a planned job to the end of the render queue."""
        self.streams[job.queue].remove(job)
        job.stage, job.state, job.engine, job.progress = "render", "queued", None, {}
        job.runs -= job.confirmed
        job.delivered = job.lapsed = False
        self.streams[job.queue].append(job)

    @property
    def can_claim(self) -> bool:
        return any(job.lapsed or not job.delivered for jobs in self.streams.values() for job in jobs)

    def is_orphan(self, job: Job) -> bool:
        return job.orphaned and self.heard

    def claim(self, free: FreeCapacity, known_format: int, stage: str) -> Job | None:
        """Return the job a claim must get, after clearing what comes before it."""
        self.cleared = []
        interactive, batch = (self._first(priority, known_format, stage) for priority in ("interactive", "batch"))
        self.rival = interactive if batch else None
        job, (work, jobs) = interactive or batch, self.overtaken[stage]
        if batch is not None and work >= 3 * batch.work:
            holds = work >= 16 * batch.work and jobs >= 32
            job = batch if holds or batch.fits(free) else job
        return job if job and job.fits(free) else None

    def _first(self, priority: str, known_format: int, stage: str) -> Job | None:
        """Return the first job of a priority: of all stages, one that is planned."""
        queues = {"plan": [priority], "render": [f"render:{priority}"], "all": [f"render:{priority}", priority]}
        return next((job for queue in queues[stage] if (job := self._first_of(queue, known_format))), None)

    def _first_of(self, queue: str, known_format: int) -> Job | None:
        while (job := self._head(queue, known_format)) is not None:
            if job.late or self.is_orphan(job) or job.is_given_up:
                job.delivered = True
                state = "expired" if job.late else "cancelled" if self.is_orphan(job) else "failed"
                self.dead_lettered += state == "failed"
                self.end(job, state)
                self.cleared.append(job)
            else:
                return job
        return None

    def grant(self, job: Job, engine: str, stage: str) -> None:
        work, jobs = self.overtaken[stage]
        if self.rival is None:
            self.overtaken[stage] = 0, 0
        elif job.priority == "batch":
            self.overtaken[stage] = min(work - 3 * job.work, 3 * job.work + self.rival.work), 0
        else:
            self.overtaken[stage] = work + job.work, jobs + 1
        if job.lapsed and job.death:
            job.deaths[job.epoch], job.lapses[job.epoch] = job.death, job.engine
        job.epoch, job.confirmed, job.alone = job.epoch + 1, False, bool(job.deaths)
        job.state, job.engine, job.progress = "running", engine, {}
        job.delivered, job.lapsed = True, False

    def _head(self, queue: str, known_format: int) -> Job | None:
        def is_newer(job: Job) -> bool:
            return job.live and job.format > known_format and not job.late

        jobs = self.streams[queue]
        for job in jobs:
            if job.delivered and job.lapsed and not is_newer(job):
                return job
        for job in jobs:
            if not job.delivered:
                if not is_newer(job):
                    return job
                job.delivered = job.lapsed = True  # passed over
        return None
