"""An engine whose step hangs ends, whatever else happens, after it has handed its jobs back."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from engine.config import EXIT_STUCK, EngineSettings
from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.job import EngineInfo, JobRecord, JobSpec, JobState
from engine.worker import watchdog
from engine.worker import worker as worker_module
from engine.worker.watchdog import exit_within
from engine.worker.worker import Worker
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.job_queue import JobQueue
from tests.waiting import until

SPEC = JobSpec("a poster", 64, 64, seed=1, num_inference_steps=3)


class Hang:
    """A step that hangs until the process ends; records the exit codes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.codes: list[int] = []
        self.began, self._over = threading.Event(), threading.Event()
        monkeypatch.setattr(engine.renderer.runner, "advance", self._advance)
        monkeypatch.setattr(watchdog.os, "_exit", self._exit)

    def _advance(self, renderings: object) -> None:
        self.began.set()
        assert self._over.wait(60)

    def _exit(self, code: int) -> None:
        self.codes.append(code)
        self._over.set()  # a thread cannot be killed in a test either


@pytest.fixture
def engine(model: GlmImage) -> Engine:
    return small_engine(model)


@pytest.fixture
def hang(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    monkeypatch.setattr(watchdog, "CPU_TIMEOUT_PER_MEGAPIXEL_S", 0.0)
    monkeypatch.setattr(worker_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(watchdog, "TICK_S", 0.1)
    hang = Hang(engine, monkeypatch)
    yield hang
    hang._over.set()


@asynccontextmanager
async def hanging(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
    """Yield a worker whose step hangs, and its task; the step may take `timeout_s` from then on."""
    settings = EngineSettings(redis_url="", engine_id=f"engine-{time.monotonic_ns()}", grace_s=300)
    info = EngineInfo(settings.engine_id, 1, "all", "ready", "m", "64x64", 512, 2048)
    worker = Worker(engine, queue, info, settings)
    await queue.submit(SPEC, job_id="j", timeout_s=60, priority="interactive", max_queue=9)
    task = asyncio.ensure_future(worker.run())
    await until(hang.began.is_set, seconds=20)
    monkeypatch.setattr(watchdog, "STEP_TIMEOUT_S", timeout_s)
    yield worker, task
    await asyncio.wait({task}, timeout=20)
    assert task.done()
    assert hang.codes
    assert set(hang.codes) == {EXIT_STUCK}


async def record_of(queue: JobQueue) -> JobRecord:
    record = await queue.get("j")
    assert record is not None
    return record


async def test_an_exception_in_a_loop_during_a_hang(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("planted")

    async with hanging(queue, engine, hang, monkeypatch, timeout_s=1.0) as (worker, task):
        monkeypatch.setattr(queue, "heartbeat", broken)
        await until(lambda: worker._stopping.is_set(), seconds=10)
        while (await record_of(queue)).state is JobState.RUNNING:
            assert not hang.codes, "the job is handed back before the process ends"
            await asyncio.sleep(0.01)
    with pytest.raises(ValueError, match="planted"):
        task.result()
    assert (await record_of(queue)).state is JobState.QUEUED


async def test_a_second_sigterm_during_a_hang(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hanging(queue, engine, hang, monkeypatch, timeout_s=1.0) as (worker, _):
        worker.drain()
        worker.drain()
    assert (await record_of(queue)).state is JobState.QUEUED


async def test_a_sigterm_during_a_hang(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let heartbeats never return, as with a Redis that hangs: the watchdog does not wait for them."""

    async def never(*_: object) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(queue, "heartbeat", never)
    async with hanging(queue, engine, hang, monkeypatch, timeout_s=0.5) as (worker, _):
        worker.drain()
        await until(lambda: bool(hang.codes), seconds=20)
    assert (await record_of(queue)).state is JobState.QUEUED


@pytest.mark.parametrize("how", ["unreachable", "hanging"])
async def test_a_redis_that_does_not_answer_does_not_keep_the_process(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def requeue_all(*_: object) -> int:
        if how == "unreachable":
            raise QueueUnavailable("planted")
        while not hang.codes:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        return 0

    monkeypatch.setattr(watchdog, "HAND_BACK_S", 0.5)
    async with hanging(queue, engine, hang, monkeypatch, timeout_s=0.5) as (_, task):
        monkeypatch.setattr(queue, "requeue_all", requeue_all)
        await until(lambda: bool(hang.codes), seconds=20)
        task.cancel()


@pytest.mark.parametrize("step_hangs", [True, False])
async def test_a_blocked_event_loop(
    queue: JobQueue, engine: Engine, hang: Hang, monkeypatch: pytest.MonkeyPatch, step_hangs: bool
) -> None:
    monkeypatch.setattr(watchdog, "HAND_BACK_S", 0.2)
    if not step_hangs:
        monkeypatch.setattr(watchdog, "LOOP_TIMEOUT_S", 0.5)
    async with hanging(queue, engine, hang, monkeypatch, timeout_s=0.5 if step_hangs else 1000.0) as (worker, _):
        blocked_at = time.monotonic()
        while not hang.codes and time.monotonic() - blocked_at < 20:
            time.sleep(0.01)  # noqa: ASYNC251
        worker.drain()
        worker.drain()


def test_a_block_that_takes_too_long_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.set())
    with exit_within(0.05):
        assert ended.wait(20)
    ended.clear()
    with exit_within(0.3):
        pass
    assert not ended.wait(0.5)
