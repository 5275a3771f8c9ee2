"""Each planted bug must still match the code."""

from tests.jobs.planted_bugs import BUGS, ROOT


def test_every_bug_can_be_planted():
    for bug in BUGS:
        count = (ROOT / bug.file).read_text().count(bug.old)
        assert count == 1, f"{bug.name}: {bug.old!r} is {count} times in {bug.file}"
