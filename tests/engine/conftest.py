"""What the tests of the engine share."""

from collections.abc import Iterator

import pytest

from engine.planner.runner import threads


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Pictures must not depend on their neighbours with several threads either, between which torch divides its work;
    the test run as a whole may be given one."""
    with threads(2):
        yield
