"""Engines that die, are misconfigured or ignore SIGTERM."""

import asyncio
import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from engine.errors import QueueUnavailable
from engine.jobs.job import JobState
from engine.worker.status import StatusFile
from server.processes import engine_watch
from server.processes import supervisor as supervisor_module
from server.processes.backoff import Backoff
from server.processes.engine_watch import EngineWatch
from server.processes.supervisor import EngineMisconfigured, Supervisor, engine_environments
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, submit
from tests.jobs.test_blame import lapse
from tests.waiting import until

FAKE_ENGINE = str(Path(__file__).with_name("fake_engine.py"))


class Starts:
    """The lines that fake engines write when they start."""

    def __init__(self, path: Path):
        self.path = path
        self.environment = {**os.environ, "FAKE_ENGINE_LOG": str(path)}

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def pids(self) -> list[int]:
        return [int(line[1]) for line in self.lines()]


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path / "starts")


def make(queue: JobQueue, starts: Starts, mode: str, *, count: int = 1) -> Supervisor:
    return Supervisor(
        [sys.executable, FAKE_ENGINE, mode],
        [starts.environment] * count,
        queue,
        backoff=Backoff(initial=0.05, maximum=0.2),
    )


async def run_with_a_job(
    supervisor: Supervisor, queue: JobQueue, starts: Starts, engines: int = 1
) -> "asyncio.Task[None]":
    """Run the supervisor until its engines have started and the first has a job."""
    running = asyncio.create_task(supervisor.run())
    await until(lambda: len(starts.lines()) == engines)
    await submit(queue, job_id="j")
    assert await queue.claim(starts.lines()[0][0], IDLE) is not None
    return running


def test_backoff_doubles_up_to_a_maximum_and_is_reset() -> None:
    backoff = Backoff(initial=1, maximum=5, reset_after=60)
    delays = [0.0]
    for _ in range(5):
        delays.append(backoff.next_delay(delays[-1], uptime=0.1))
    assert delays[1:] == [1, 2, 4, 5, 5]
    assert backoff.next_delay(5, uptime=61) == 1


async def test_a_dead_engine_is_restarted_with_a_new_id(queue: JobQueue, starts: Starts) -> None:
    supervisor = make(queue, starts, "die")
    running = asyncio.create_task(supervisor.run())
    await until(lambda: len(starts.lines()) >= 3)
    running.cancel()
    await supervisor.stop(5)
    await asyncio.wait([running])
    assert len({line[0] for line in starts.lines()}) == len(starts.lines())


async def test_a_dead_engine_s_jobs_are_free_at_once(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make(queue, starts, "stubborn")
    running = await run_with_a_job(supervisor, queue, starts)
    os.kill(starts.pids()[0], 9)
    await until(lambda: len(starts.lines()) == 2, seconds=3)  # well before the lease of 10 s ends
    claim = await queue.claim("another", IDLE)
    assert claim is not None
    assert claim.runs == 1  # SIGKILL, and not for want of memory: the job has not shown anything
    monkeypatch.setattr(supervisor_module, "HAND_BACK_S", 0.1)
    await supervisor.stop(0)
    await asyncio.wait_for(running, 1)


async def test_a_job_is_blamed_for_a_crash(queue: JobQueue, starts: Starts) -> None:
    supervisor = make(queue, starts, "stubborn")
    running = await run_with_a_job(supervisor, queue, starts)
    os.kill(starts.pids()[0], signal.SIGSEGV)
    await until(lambda: len(starts.lines()) == 2, seconds=3)
    claim = await queue.claim("another", IDLE)
    assert claim is not None
    assert claim.runs == 2
    running.cancel()
    os.kill(int(starts.lines()[1][1]), signal.SIGKILL)
    await supervisor.stop(5)


async def test_an_engine_that_cannot_be_forked_is_tried_again(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, errors = asyncio.create_subprocess_exec, [errno.EAGAIN, errno.ENOMEM, errno.ENOENT]

    async def fail_first(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise OSError(errors[0], os.strerror(errors.pop(0)))
        return await create(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_first)
    supervisor = make(queue, starts, "stubborn")
    running = asyncio.create_task(supervisor.run())
    await until(lambda: len(starts.lines()) == 1)
    assert not running.done()
    os.kill(starts.pids()[0], signal.SIGKILL)
    await supervisor.stop(5)
    await asyncio.wait_for(running, 5)


async def test_an_error_while_requeueing_does_not_end_the_supervision(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> int:
        raise ResponseError("BUSY")

    monkeypatch.setattr(queue, "requeue_all", fail)
    monkeypatch.setattr(supervisor_module, "REQUEUE_AT_STOP_S", 0.1)
    supervisor = make(queue, starts, "die")
    running = asyncio.create_task(supervisor.run())
    await until(lambda: len(starts.lines()) >= 2)
    await supervisor.stop(5)
    await asyncio.wait_for(running, 5)


async def test_a_verdict_holds_though_redis_is_away_when_the_engine_dies(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, away = queue.requeue_all, asyncio.Event()
    away.set()

    async def requeue_all(*arguments: Any, **options: Any) -> int:
        if away.is_set():
            raise QueueUnavailable("planted")
        return await real(*arguments, **options)

    monkeypatch.setattr(queue, "requeue_all", requeue_all)
    monkeypatch.setattr(supervisor_module, "REQUEUE_INTERVAL_S", 0.05)
    supervisor = make(queue, starts, "stubborn")
    running = await run_with_a_job(supervisor, queue, starts)
    os.kill(starts.pids()[0], signal.SIGKILL)
    await until(lambda: len(starts.lines()) == 2)  # does not wait for Redis
    await lapse(queue)
    claim = await queue.claim("another", IDLE)
    assert claim is not None
    assert (claim.runs, claim.quarantined) == (2, True)
    away.clear()
    await until(lambda: not supervisor._late)
    record = await queue.get("j")
    assert record is not None
    assert (record.state, record.runs) == (JobState.RUNNING, 1)
    running.cancel()
    os.kill(starts.pids()[1], signal.SIGKILL)
    await supervisor.stop(5)


async def test_an_engine_that_hangs_is_killed_and_its_jobs_are_blamed(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(engine_watch, "HUNG_S", 1.0)
    supervisor = make(queue, starts, "hung")
    running = await run_with_a_job(supervisor, queue, starts)
    await until(lambda: len(starts.lines()) == 2, seconds=20)
    claim = await queue.claim("another", IDLE)
    assert claim is not None
    assert claim.runs == 2
    await supervisor.stop(0)
    await asyncio.wait_for(running, 5)


class TestEngineWatch:
    """Polls of an engine's status as `must_die` sees it."""

    @pytest.mark.parametrize(
        ("polls", "dies_at"),
        [
            ([(0, False)] * 100, 13),
            ([(0, True)] * 100, 61),
            ([(0, False)] * 5 + [(0, True)] * 50 + [(0, False)] * 12, None),  # frozen for 250 s
            ([(0, False)] * 12 + [(1, False)] * 12, None),
            ([None] * 100, None),  # loading, or unable to write
            ([(0, False)] * 12 + [None] + [(0, False)] * 12, None),
        ],
    )
    def test_only_a_file_that_stays_old_is_deadly(
        self, polls: list[tuple[float, bool] | None], dies_at: int | None
    ) -> None:
        watch = EngineWatch()
        looks: list[Any] = [
            look and SimpleNamespace(written_at=look[0], is_stopped=look[1], is_alive=True) for look in polls
        ]
        assert next((n for n, look in enumerate(looks, 1) if watch.must_die(look)), None) == dies_at
        if dies_at:
            hung = not looks[dies_at - 1].is_stopped
            assert watch.is_evidence(-signal.SIGKILL, killed_by_us=False) == hung

    async def test_a_process_stopped_by_a_signal_is_seen(self) -> None:
        process = await asyncio.create_subprocess_exec("sleep", "60")
        status = StatusFile("e", process.pid, "", "ready", 0)
        assert not status.is_stopped
        process.send_signal(signal.SIGSTOP)
        await until(lambda: status.is_stopped)
        process.send_signal(signal.SIGCONT)
        await until(lambda: not status.is_stopped)
        process.kill()
        await process.wait()
        assert not status.is_stopped


async def test_a_misconfigured_engine_is_not_restarted(
    queue: JobQueue, starts: Starts, capfd: pytest.CaptureFixture[str]
) -> None:
    supervisor = make(queue, starts, "misconfigured", count=2)
    with pytest.raises(EngineMisconfigured):
        await asyncio.wait_for(supervisor.run(), 5)
    await supervisor.stop(5)
    assert len(starts.lines()) <= 2
    assert "no checkpoint there" in capfd.readouterr().err


async def test_one_that_has_worked_is_restarted(queue: JobQueue, starts: Starts) -> None:
    """Its checkpoint's disk or its device may come back, and the API serves on meanwhile."""
    supervisor = make(queue, starts, "misconfigured")
    supervisor._backoff = Backoff(0.05, reset_after=0.0)
    running = asyncio.create_task(supervisor.run())
    await until(lambda: len(starts.lines()) >= 3)
    assert not running.done()
    await supervisor.stop(5)
    await running


async def test_stop_kills_engines_that_outlive_the_grace_period_and_frees_their_jobs(
    queue: JobQueue, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HAND_BACK_S", 0.5)
    supervisor = make(queue, starts, "stubborn", count=2)
    running = await run_with_a_job(supervisor, queue, starts, engines=2)
    started = time.monotonic()
    await supervisor.stop(0.3)
    # Engines get more than the grace period: they hand back unfinished jobs only at its end.
    assert 0.8 <= time.monotonic() - started < 2
    assert not any(alive(pid) for pid in starts.pids())
    assert await queue.claim("another", IDLE) is not None
    await asyncio.wait_for(running, 1)


async def test_stop_during_the_delay_before_a_restart(queue: JobQueue, starts: Starts) -> None:
    supervisor = Supervisor(
        [sys.executable, FAKE_ENGINE, "die"], [starts.environment], queue, backoff=Backoff(initial=60)
    )
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor._processes and supervisor._processes[0].returncode is not None)
    await asyncio.wait_for(supervisor.stop(5), 1)
    await asyncio.wait_for(running, 1)
    assert len(starts.lines()) == 1


class TestEnvironments:
    def test_one_engine_keeps_the_environment(self) -> None:
        assert engine_environments({"A": "1"}, 1, "auto") == [{"A": "1"}]

    def test_threads_are_divided(self) -> None:
        cores = len(os.sched_getaffinity(0))
        assert [e["OMP_NUM_THREADS"] for e in engine_environments({}, 2, "cpu")] == [str(max(1, cores // 2))] * 2
        assert engine_environments({"OMP_NUM_THREADS": "7"}, 2, "cpu")[1]["OMP_NUM_THREADS"] == "7"

    def test_gpus_are_assigned_in_turn(self) -> None:
        environments = engine_environments({"CUDA_VISIBLE_DEVICES": "4,6"}, 3, "cuda")
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["4", "6", "4"]
        assert "CUDA_VISIBLE_DEVICES" not in engine_environments({}, 2, "cpu")[0]
