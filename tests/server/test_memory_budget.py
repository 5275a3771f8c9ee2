"""The bytes that an API process holds for its clients."""

import functools
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.keys import ANONYMOUS, Caller
from server.admission.memory_budget import GIVES_WAY_S, RESERVE_BYTES, SMALL_BYTES, Hold, MemoryBudget
from server.errors import ApiError

MAXIMUM = 100
CALLERS = [ANONYMOUS, Caller("alice"), Caller("bob")]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(6)), st.integers(0, 150)), max_size=40))
def test_the_sum_is_exact_and_bounded(steps: list[tuple[int, int]]) -> None:
    """Six holds of three callers are resized in any order; a refused size changes nothing."""
    budget, sizes = MemoryBudget(MAXIMUM), [0] * 6
    holds = [Hold(budget, CALLERS[index % 3]) for index in range(6)]
    for index, size in steps:
        others = sum(sizes) - sizes[index]
        try:
            holds[index].resize(size)
        except ApiError as error:
            refused = error
        else:
            refused = None
        shrinks_or_alone = size <= sizes[index] or others == 0
        if refused is None:
            assert others + size <= MAXIMUM or shrinks_or_alone
            sizes[index] = size
        else:
            assert not shrinks_or_alone
            assert refused.status in (429, 503)
        assert budget.in_use == sum(sizes)
    for hold in holds:
        hold.release()
    assert budget.in_use == 0


def test_a_key_gets_half_and_leaves_the_rest_to_others() -> None:
    budget = MemoryBudget(MAXIMUM)
    alice, bob = CALLERS[1:]
    with ExitStack() as holds:
        holds.enter_context(budget.hold(alice, 40))
        with pytest.raises(ApiError, match="this key") as refused, budget.hold(alice, 11):
            pass
        assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
        holds.enter_context(budget.hold(bob, 50))
        with pytest.raises(ApiError) as full, budget.hold(ANONYMOUS, 11):
            pass
        assert (full.value.status, full.value.headers) == (503, {"retry-after": "2"})
        holds.enter_context(budget.hold(alice, 10))
    assert budget.in_use == 0


def test_a_size_beyond_the_maximum_is_accepted_alone() -> None:
    budget = MemoryBudget(MAXIMUM)
    with budget.hold(CALLERS[1], 1000) as held:
        with pytest.raises(ApiError), budget.hold(CALLERS[2], 1):
            pass
        held.resize(10)
        with budget.hold(CALLERS[2], 40):
            pass


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=40))
def test_only_slow_bodies_give_way(steps: list[tuple[int, int, int]]) -> None:
    """Bodies grow in any order and at any pace: the sum stays bounded, and each that ends had not grown for long."""
    now, gone = 0.0, set[int]()
    budget = MemoryBudget(MAXIMUM, lambda: now)
    holds = [Hold(budget, CALLERS[index % 3]) for index in range(6)]
    sizes, grown_at = [0] * 6, [0.0] * 6
    with ExitStack() as arriving:
        for index, hold in enumerate(holds):
            arriving.enter_context(hold.arriving(functools.partial(gone.add, index)))
        for index, size, seconds in steps:
            now += seconds
            before = set(gone)
            if index in gone:
                continue
            with suppress(ApiError):
                holds[index].resize(sizes[index] + size)
                sizes[index] += size
                grown_at[index] = now
            for other in gone - before:
                assert other != index
                assert now - grown_at[other] >= GIVES_WAY_S
                sizes[other] = 0
            assert budget.in_use == sum(sizes)
            assert budget.in_use <= MAXIMUM or budget.in_use == max(sizes)


def test_a_body_that_has_arrived_does_not_give_way() -> None:
    now, gone = 0.0, list[str]()
    budget = MemoryBudget(MAXIMUM, lambda: now)
    with budget.hold(ANONYMOUS, 60) as held, held.arriving(lambda: gone.append("first")):
        now = GIVES_WAY_S
        held.arrived()
        with pytest.raises(ApiError), budget.hold(CALLERS[1], 60):
            pass
    assert not gone


def test_large_bodies_leave_a_reserve_for_small_ones() -> None:
    budget = MemoryBudget(16 * RESERVE_BYTES)
    with ExitStack() as holds:
        for number in range(1000):
            with suppress(ApiError):
                holds.enter_context(budget.hold(Caller(f"k{number}"), 2**20))
        for _ in range(RESERVE_BYTES // SMALL_BYTES):
            holds.enter_context(budget.hold(CALLERS[1], SMALL_BYTES))
