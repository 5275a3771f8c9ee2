"""Each planted bug must still match the code."""

from tests.planting import check
from tests.server.planted_bugs import BUGS


def test_every_bug_can_be_planted() -> None:
    for bug in BUGS:
        check(bug)
