"""What the tests of the engine share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Pictures must not depend on their neighbours with several threads either, between which torch divides its work;
    the test run as a whole may be given one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
