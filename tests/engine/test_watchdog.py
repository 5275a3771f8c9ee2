"""The watchdog alone: when a step counts as stuck, and what ends the process."""

import time
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.config import EXIT_STUCK
from engine.errors import QueueUnavailable
from engine.jobs.job import JobSpec
from engine.worker import watchdog
from engine.worker.watchdog import CPU_TIMEOUT_PER_MEGAPIXEL_S, STEP_TIMEOUT_S, Watchdog

HALF_A_MEGAPIXEL = JobSpec("", 1000, 500, seed=0, n=2)
SMALL = JobSpec("", 64, 64, seed=0)
EDIT = JobSpec("", 1000, 500, seed=0, num_sources=1, source_tokens=1_500_000 // 32**2)
LONG_TEXT = JobSpec("x" * 2000, 512, 512, seed=0, negative_prompt="y" * ((1_000_000 - 512**2) // 16**2 - 2000))


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def run(self, dog: Watchdog, seconds: float) -> list[bool]:
        """Let time pass as for a process that is not stopped; return the checks."""
        checks = []
        while seconds > 0:
            self.now += min(seconds, watchdog.TICK_S)
            seconds -= watchdog.TICK_S
            checks.append(dog.check())
        return checks


class Queue:
    """Records requeued consumers, or raises as an unreachable Redis would."""

    def __init__(self, *, reachable: bool = True) -> None:
        self.requeued: list[str] = []
        self._reachable = reachable

    async def requeue_all(self, consumer: str) -> int:
        if not self._reachable:
            raise QueueUnavailable("planted")
        self.requeued.append(consumer)
        return 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.mark.parametrize(
    ("specs", "on_cpu", "timeout"),
    [
        ([HALF_A_MEGAPIXEL], False, STEP_TIMEOUT_S),
        ([], True, STEP_TIMEOUT_S),
        ([SMALL, HALF_A_MEGAPIXEL, HALF_A_MEGAPIXEL], True, STEP_TIMEOUT_S + 0.5 * CPU_TIMEOUT_PER_MEGAPIXEL_S),
        ([EDIT, HALF_A_MEGAPIXEL], True, STEP_TIMEOUT_S + 2 * CPU_TIMEOUT_PER_MEGAPIXEL_S),
        ([LONG_TEXT], True, STEP_TIMEOUT_S + CPU_TIMEOUT_PER_MEGAPIXEL_S),
        ([EDIT, LONG_TEXT], False, STEP_TIMEOUT_S),
    ],
)
def test_a_step_is_stuck_after_its_timeout(clock: Clock, specs: list[JobSpec], on_cpu: bool, timeout: float) -> None:
    dog = Watchdog(lambda: specs, on_cpu=on_cpu)
    clock.run(dog, 1000)
    dog.beat()
    dog.check()
    clock.run(dog, timeout - 0.1)
    assert not dog.is_stuck
    clock.run(dog, 0.2)
    assert dog.is_stuck


def test_only_a_step_that_is_stuck_at_two_checks_is_confirmed(clock: Clock) -> None:
    dog = Watchdog(list, on_cpu=False)
    for _ in range(2):
        dog.beat()
        dog.check()
        assert not any(clock.run(dog, STEP_TIMEOUT_S))
        assert dog.is_stuck
    assert clock.run(dog, 1) == [True]


def test_a_hang_on_cuda_is_found_within_15_seconds(clock: Clock) -> None:
    dog = Watchdog(list, on_cpu=False)
    clock.run(dog, 7.5)
    dog.beat()
    assert any(clock.run(dog, 14))


@given(
    step_s=st.floats(0.1, STEP_TIMEOUT_S - 1),
    freezes=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1000)), max_size=2, unique_by=lambda freeze: freeze[0]),
)
def test_a_process_that_is_stopped_is_not_stuck(step_s: float, freezes: list[tuple[int, float]]) -> None:
    """Run steps that each end in time, of a process that is stopped for any time at any two ticks."""
    clock = Clock()
    with patch.object(time, "monotonic", clock):
        dog = Watchdog(list, on_cpu=False)
        left_s, stops = step_s, dict(freezes)
        for tick in range(40):
            clock.now += watchdog.TICK_S + stops.get(tick, 0)
            left_s -= watchdog.TICK_S
            while left_s <= 0:
                dog.beat()
                left_s += step_s
            assert not dog.check()
            assert not dog.is_loop_stuck or tick >= watchdog.LOOP_TIMEOUT_S - 1


def test_a_loop_is_stuck_after_its_timeout(clock: Clock) -> None:
    dog = Watchdog(list, on_cpu=False)
    dog.beat_loop()
    dog.check()
    clock.run(dog, watchdog.LOOP_TIMEOUT_S - 1)
    assert not dog.is_loop_stuck
    clock.run(dog, 1)
    assert dog.is_loop_stuck
    dog.beat_loop()
    assert not dog.is_loop_stuck


@pytest.mark.parametrize("reachable", [True, False])
async def test_giving_up_requeues_the_jobs_and_ends_the_process(
    reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_process(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(watchdog.os, "_exit", end_process)
    queue = Queue(reachable=reachable)
    with pytest.raises(SystemExit) as ended:
        await Watchdog(lambda: [SMALL], on_cpu=False).give_up(queue, "engine-0")  # type: ignore[arg-type]
    assert ended.value.code == EXIT_STUCK
    assert queue.requeued == ["engine-0"] * reachable
