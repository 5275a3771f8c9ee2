"""Memory accounting of the planner, and order and fairness of the renderer. Integers only."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import RequestError
from engine.jobs.job import JobSpec, Plan
from engine.planner.block_allocator import BlockAllocator
from engine.planner.scheduler import PlannerScheduler
from engine.renderer.scheduler import PATIENCE, RenderScheduler
from engine.request import Request

BLOCK = 16


def request(prompt: int = 20, n: int = 1, side: int = 64) -> Request:
    request = Request("r", JobSpec("p", side, side, seed=0, n=n))
    request.prompt_ids = list(range(prompt))
    return request


class BlockAllocation(RuleBasedStateMachine):
    """Any order of allocate, share and release keeps free + used = total."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(40)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 12))
    def allocate(self, count: int) -> None:
        if count <= self.allocator.free:
            self.held.append(self.allocator.allocate(count))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        self.held.append(self.allocator.share(data.draw(st.sampled_from(self.held))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.allocator.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def free_plus_used_is_total(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.used == len({block for blocks in self.held for block in blocks})


TestBlockAllocation = BlockAllocation.TestCase


class Planning(RuleBasedStateMachine):
    """Requests are admitted, prefilled, written and finished or aborted in any order: nothing leaks, and only whole
    blocks of a prompt are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = PlannerScheduler(
            blocks=120, block_size=BLOCK, max_sequences=12, max_prompt_tokens=200, chunk_tokens=32
        )
        self.requests: list[Request] = []

    @rule(prompt=st.integers(1, 90), n=st.integers(1, 4))
    def admit(self, prompt: int, n: int) -> None:
        new = request(prompt, n)
        if self.planner.fits(new):
            self.planner.admit(new)
            self.requests.append(new)

    @rule()
    def step(self) -> None:
        step = self.planner.schedule()
        for group in step.prefill:
            self.planner.mark_prefilled(group)
        for sequence in step.decode:
            sequence.written = min(sequence.total, sequence.written + 97)
        for sequence in self.planner.completed_sequences():
            self.planner.finish(sequence)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.planner.abort(data.draw(st.sampled_from(self.requests)))

    @invariant()
    def free_plus_used_is_total(self) -> None:
        self.planner.check_integrity()

    @invariant()
    def sequences_share_only_whole_prompt_blocks(self) -> None:
        owner: dict[int, tuple[Request, int]] = {}
        buffers = [sequence.buffer_index for sequence in self.planner.sequences]
        assert len(set(buffers)) == len(buffers)
        for sequence in self.planner.sequences:
            assert len(sequence.blocks) * BLOCK >= sequence.prompt_length + sequence.total
            for position, block in enumerate(sequence.blocks):
                shared = position < sequence.prompt_length // BLOCK
                if block in owner:
                    assert shared
                    assert owner[block] == (sequence.request, position)
                owner[block] = (sequence.request, position)


TestPlanning = Planning.TestCase


def test_images_of_a_request_share_the_prompt() -> None:
    planner = PlannerScheduler(blocks=200, block_size=BLOCK, max_sequences=10, max_prompt_tokens=1000)
    planner.admit(request(prompt=10 * BLOCK + 3, n=3))
    per_image = -(-(3 + request().spec.geometry.plan_tokens) // BLOCK)
    assert planner.allocator.used == 10 + 3 * per_image


def test_a_request_that_can_never_fit_is_refused_with_the_reason() -> None:
    planner = PlannerScheduler(blocks=40, block_size=BLOCK, max_sequences=4, max_prompt_tokens=100)
    with pytest.raises(RequestError, match="101 tokens; this server takes at most 100") as caught:
        planner.check(request(prompt=101))
    assert (caught.value.param, caught.value.code) == ("prompt", "prompt_too_long")
    with pytest.raises(RequestError, match="planner memory") as caught:
        planner.check(request(n=3))
    assert caught.value.param == "n"
    planner.check(request())


def test_a_planned_request_needs_no_memory() -> None:
    planner = PlannerScheduler(blocks=1, block_size=BLOCK, max_sequences=1, max_prompt_tokens=10)
    planned = request(prompt=500)
    planned.images[0].plan = Plan(2, 2, [0] * 4)
    planner.check(planned)
    assert planner.fits(planned)


def test_prefill_stays_within_its_limit_but_always_advances() -> None:
    planner = PlannerScheduler(1000, BLOCK, 10, max_prompt_tokens=500, prefill_tokens=150)
    for prompt in (400, 100, 40, 20):
        planner.admit(request(prompt))
    sizes = []
    while step := planner.schedule().prefill:
        sizes.append([len(group.request.prompt_ids) for group in step])
        for group in step:
            planner.mark_prefilled(group)
    assert sizes == [[400], [100, 40], [20]]


def test_a_long_prompt_is_prefilled_in_chunks_beside_others_and_decode() -> None:
    planner = PlannerScheduler(1000, BLOCK, 10, max_prompt_tokens=500, prefill_tokens=150, chunk_tokens=100)
    planner.admit(first := request(20))
    planner.mark_prefilled(planner.schedule().prefill[0])
    for prompt in (250, 30):
        planner.admit(request(prompt))
    chunks = []
    while (step := planner.schedule()).prefill:
        assert [sequence.request for sequence in step.decode][:1] == [first]
        chunks.append([(group.start, group.end) for group in step.prefill])
        for group in step.prefill:
            planner.mark_prefilled(group)
    assert chunks == [[(0, 100), (0, 30)], [(100, 200)], [(200, 250)]]


# --- renderer


@dataclass(eq=False)
class Work:
    tokens: int
    steps_left: int
    deadline_at: float = float("inf")


def run(scheduler: RenderScheduler[Work], ticks: int, now: float = 0.0) -> list[list[Work]]:
    history = []
    for _ in range(ticks):
        picked = scheduler.pick(now)
        history.append(picked)
        for work in picked:
            work.steps_left -= 1
            if not work.steps_left:
                scheduler.remove(work)
    return history


def test_least_remaining_work_goes_first_and_equals_are_not_interleaved() -> None:
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=100)
    long, short = Work(100, 10), Work(100, 3)
    scheduler.add(long)
    scheduler.add(short)
    assert [tick[0] for tick in run(scheduler, 4)] == [short, short, short, long]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=12), st.integers(1, 9), st.integers(1, 3))
def test_equal_images_are_finished_one_after_another(arrivals: list[int], steps: int, at_once: int) -> None:
    """Begin an image only when those before it leave room, whenever it arrives."""
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=100 * at_once)
    works, arrivals = [Work(100, steps) for _ in arrivals], sorted(arrivals)
    coming, now = list(zip(arrivals, works, strict=True)), 0
    while coming or len(scheduler):
        while coming and coming[0][0] <= now:
            scheduler.add(coming.pop(0)[1])
        run(scheduler, 1)
        now += 1
        begun = [work for work in works if 0 < work.steps_left < steps]
        assert len(begun) <= at_once
        left = [work.steps_left for work in works]
        assert left == sorted(left)


def test_a_tick_is_filled_to_the_limit_and_never_beyond() -> None:
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=100)
    works = [Work(60, 5), Work(50, 8), Work(40, 20), Work(30, 40)]
    for work in works:
        scheduler.add(work)
    assert run(scheduler, 1) == [[works[0], works[2]]]


def test_one_image_always_advances_however_large() -> None:
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=10)
    scheduler.add(work := Work(1000, 2))
    assert run(scheduler, 2) == [[work], [work]]


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 30)), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_long_image_does_not_starve_under_a_stream_of_short_ones(others: list[tuple[int, int]]) -> None:
    """Bound the wait by the ticks that twice the image's own work and all earlier work fill."""
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=100)
    long = Work(400, 50)
    scheduler.add(long)
    for tokens, steps in others:
        scheduler.add(Work(tokens, steps))
    bound = (PATIENCE * long.tokens * long.steps_left + sum(a * b for a, b in others)) // 100
    bound += 2 * sum(b for _, b in others) + 2  # ticks that others fill badly, and what arrives in these
    for _ in range(bound):
        scheduler.add(Work(100, 1))  # always shorter than the long one
        if long in run(scheduler, 1)[0]:
            return
    pytest.fail(f"passed over {bound} times")


def test_an_image_about_to_miss_its_deadline_goes_before_shorter_ones() -> None:
    scheduler: RenderScheduler[Work] = RenderScheduler(token_budget=100)
    scheduler.observe(tokens=100, seconds=1.0)
    urgent, short = Work(100, 10, deadline_at=15.0), Work(100, 2)
    scheduler.add(short)
    scheduler.add(urgent)
    assert scheduler.pick(now=0.0) == [urgent]
    relaxed: RenderScheduler[Work] = RenderScheduler(token_budget=100)
    relaxed.observe(tokens=100, seconds=1.0)
    relaxed.add(short)
    relaxed.add(Work(100, 10, deadline_at=100.0))
    assert relaxed.pick(now=0.0) == [short]
