"""A small campaign with real processes, without the durations, which depend on the machine: see `make chaos`."""

from pathlib import Path

import pytest

from tests.chaos.campaign import run
from tests.chaos.sizes import SHORT


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["kills", "random_kills", "overload", "rolling", "stages", "hostile", "everything"])
def test_scenario_meets_its_goals(name: str, tmp_path: Path) -> None:
    figures = run(name, tmp_path, 1, SHORT)
    assert [figure for figure in figures if figure.held is False and not figure.timed] == []
    assert sum(figure.held is True for figure in figures) >= 10
