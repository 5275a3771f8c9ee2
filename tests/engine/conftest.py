"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import pytest

from models.threads import threads


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Compute on two threads, between which torch divides its work: images must not depend on their batch then, too."""
    with threads(2):
        yield
