"""A model of the queue's visible behaviour, without Redis, leases and bytes."""

from dataclasses import dataclass, field

from engine.errors import KeyReused, QueueFull, SourcesFull, TooManyJobs
from engine.jobs.job import FreeCapacity, Plan, Priority
from tests.jobs.helpers import spec

CAP, OWNED_CAP, SOURCES_CAP, MAX_RUNS = 2, 2, 8, 3


@dataclass
class Job:
    """A job and its stream entry."""

    id: str
    priority: Priority
    images: int
    late: bool  # its deadline has passed
    sources: int  # bytes, and tokens
    owner: str = ""
    steps: int = 1
    state: str = "queued"
    runs: int = 0
    epoch: int = 0
    engine: str | None = None
    delivered: bool = False
    lapsed: bool = False  # requeued, or its lease has lapsed
    has_result: bool = False
    progress: dict[str, int] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)
    partials: set[str] = field(default_factory=set)

    @property
    def work(self) -> int:
        return spec(n=self.images, num_inference_steps=self.steps).pixel_steps

    @property
    def live(self) -> bool:
        return self.state in ("queued", "running")

    def fits(self, free: FreeCapacity) -> bool:
        if free.idle:
            return True
        cost = spec(n=self.images, num_sources=int(self.sources > 0), source_tokens=self.sources)
        return (
            self.runs < 2
            and self.images <= free.images
            and cost.plan_tokens + cost.prompt_tokens_bound <= free.kv_tokens
            and self.sources <= free.source_tokens
        )


@dataclass
class Model:
    """Live jobs by stream, oldest first."""

    streams: dict[str, list[Job]] = field(default_factory=lambda: {"interactive": [], "batch": []})
    jobs: list[Job] = field(default_factory=list)
    keys: dict[str, tuple[str, Job]] = field(default_factory=dict)  # idempotency key: fingerprint, job
    overtaken: int = 0  # work of interactive jobs claimed while the first batch job waited
    overtaken_jobs: int = 0
    rival: Job | None = None  # the first interactive job at the last claim, if a batch job waited, too
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
        self.streams[job.priority].append(job)
        self.jobs.append(job)
        return job

    def end(self, job: Job, state: str) -> None:
        job.state = state
        self.streams[job.priority].remove(job)

    def requeue(self, job: Job) -> None:
        job.state, job.lapsed, job.engine, job.progress = "queued", True, None, {}

    @property
    def can_claim(self) -> bool:
        return any(self._head(priority) for priority in self.streams)

    def claim(self, free: FreeCapacity) -> Job | None:
        """Return the job a claim must get, after clearing what comes before it."""
        self.cleared = []
        interactive, batch = self._first("interactive"), self._first("batch")
        self.rival = interactive if batch else None
        job = interactive or batch
        if batch is not None and self.overtaken >= 3 * batch.work:
            holds = self.overtaken >= 16 * batch.work and self.overtaken_jobs >= 32
            job = batch if holds or batch.fits(free) else job
        return job if job and job.fits(free) else None

    def _first(self, priority: str) -> Job | None:
        while (job := self._head(priority)) is not None:
            if job.late or job.runs >= MAX_RUNS:
                job.delivered = True
                self.dead_lettered += not job.late
                self.end(job, "expired" if job.late else "failed")
                self.cleared.append(job)
            else:
                return job
        return None

    def grant(self, job: Job, engine: str) -> None:
        if self.rival is None:
            self.overtaken = self.overtaken_jobs = 0
        elif job.priority == "batch":
            self.overtaken = min(self.overtaken - 3 * job.work, 3 * job.work + self.rival.work)
            self.overtaken_jobs = 0
        else:
            self.overtaken += job.work
            self.overtaken_jobs += 1
        job.runs, job.epoch = job.runs + 1, job.epoch + 1
        job.state, job.engine, job.progress = "running", engine, {}
        job.delivered, job.lapsed = True, False

    def _head(self, priority: str) -> Job | None:
        jobs = self.streams[priority]
        lapsed = (job for job in jobs if job.delivered and job.lapsed)
        return next(lapsed, None) or next((job for job in jobs if not job.delivered), None)
