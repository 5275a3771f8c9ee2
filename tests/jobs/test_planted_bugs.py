"""The list of planted bugs has to follow the code."""

from tests.jobs.planted_bugs import BUGS, ROOT


def test_every_bug_can_be_planted():
    for bug in BUGS:
        places = (ROOT / bug.file).read_text().count(bug.old)
        assert places == 1, f"{bug.name}: {bug.file} says {places} times {bug.old!r}"
