"""The bytes that an API process holds for its clients."""

from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.keys import ANONYMOUS, Caller
from server.admission.memory_budget import Hold, MemoryBudget
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
