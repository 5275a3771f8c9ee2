"""The campaign in small, with real processes. How fast things were is for `make chaos`: a busy machine spoils it."""

from pathlib import Path

import pytest

from tests.chaos.campaign import run
from tests.chaos.scenarios import SHORT


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["kills", "overload", "rolling", "everything"])
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    figures = run(name, tmp_path, 1, SHORT)
    assert [figure for figure in figures if figure.held is False and not figure.timed] == []
    assert sum(figure.held is True for figure in figures) >= 10
