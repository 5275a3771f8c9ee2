"""Each planted bug must still match the code."""

from tests.jobs.planted_bugs import BUGS
from tests.jobs.planted_failover_bugs import FAILOVER_BUGS
from tests.jobs.planted_stage_bugs import STAGE_BUGS
from tests.planting import check


def test_every_bug_can_be_planted():
    for bug in BUGS + STAGE_BUGS + FAILOVER_BUGS:
        check(bug)
