"""Each planted bug must still match the code, and the document counts them."""

import re

from tests.jobs.planted_bugs import BUGS as BUGS_OF_THE_QUEUE
from tests.planting import ROOT, check
from tests.server.planted_bugs import BUGS


def test_every_bug_can_be_planted() -> None:
    for bug in BUGS:
        check(bug)


def test_the_document_counts_the_bugs() -> None:
    section = (ROOT / "docs/reliability.md").read_text().partition("## Planted bugs")[2]
    in_queue, elsewhere = section.split("| planted in")[1:]
    for table, bugs in ((in_queue, BUGS_OF_THE_QUEUE), (elsewhere, BUGS)):
        assert sum(map(int, re.findall(r"\| (\d+) \|", table))) == len(bugs)
        assert f"{len(bugs)} bugs are in" in section
