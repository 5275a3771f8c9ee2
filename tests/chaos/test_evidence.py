"""The campaign finds each fault in journals, ledgers and Redis."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import redis.asyncio

from tests.chaos.cases import Case
from tests.chaos.evidence import Evidence
from tests.chaos.ledger import Ledger
from tests.chaos.redis_contents import RedisContents
from tests.chaos.report import Report
from tests.chaos.soak import Slack
from tests.job_queue import JobQueue
from tests.jobs.helpers import RESULT, claim, submit

Line = tuple[Any, ...]


def claimed(at: float, job: str, epoch: int, *, quarantined: bool = False, known: list[int] | None = None) -> Line:
    return (at, "claim", job, epoch, at, epoch, quarantined, known or [], f"prompt of {job}")


def wrote(at: float, kind: str, job: str, epoch: int, *, accepted: bool = True, detail: Any = None) -> Line:
    return (at + 0.01, kind, job, epoch, at, accepted, detail)


@pytest.fixture
def journals(tmp_path: Path) -> "Journals":
    return Journals(tmp_path)


class Journals:
    """Journals written by hand."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, engine: str, *lines: Line, cut_off: bytes = b"") -> "Journals":
        text = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        (self.folder / f"{engine}.jsonl").write_bytes(text + cut_off)
        return self

    def read(self) -> Evidence:
        return Evidence.read(self.folder)


def test_undisturbed_job_shows_no_fault(journals: Journals) -> None:
    journals.write(
        "a",
        claimed(1, "j", 1),
        wrote(2, "checkpoint", "j", 1, detail=0),
        wrote(3, "commit", "j", 1),
        (3.1, "freed", "j", 1),
    )
    found = journals.read()
    assert not found.ended_twice()
    assert not found.stale(accepted=True)
    assert not found.planned_again()
    assert not found.quarantined_in_company()
    assert found.jobs_of("prompt of j") == {"j"}


def test_incomplete_last_line_is_skipped(journals: Journals) -> None:
    journals.write("a", claimed(1, "j", 1), cut_off=b'[2.5,"commit","j",1,2')
    assert not journals.read().writes


def test_finds_two_ends_of_a_job(journals: Journals) -> None:
    journals.write("a", claimed(1, "j", 1), wrote(5, "commit", "j", 1))
    journals.write("b", claimed(2, "j", 2), wrote(3, "fail", "j", 2))
    assert journals.read().ended_twice() == ["j"]


@pytest.mark.parametrize("accepted", [True, False])
def test_write_after_a_newer_claim_is_stale(journals: Journals, accepted: bool) -> None:
    journals.write("a", claimed(1, "j", 1), wrote(5, "progress", "j", 1, accepted=accepted))
    journals.write("b", claimed(4, "j", 2))
    found = journals.read()
    assert [write.engine for write in found.stale(accepted=accepted)] == ["a"]
    assert not found.stale(accepted=not accepted)


def test_write_before_a_newer_claim_is_not_stale(journals: Journals) -> None:
    journals.write("a", claimed(1, "j", 1), wrote(3, "progress", "j", 1))
    journals.write("b", claimed(4, "j", 2))
    assert not journals.read().stale(accepted=True)


def test_finds_a_plan_made_twice(journals: Journals) -> None:
    journals.write("a", claimed(1, "j", 1), wrote(2, "checkpoint", "j", 1, detail=0))
    journals.write("b", claimed(4, "j", 2, known=[0]), wrote(5, "checkpoint", "j", 2, detail=1))
    assert not journals.read().planned_again()
    assert journals.read().resumed() == 1
    journals.write("b", claimed(4, "j", 2), wrote(5, "checkpoint", "j", 2, detail=0))
    assert journals.read().planned_again() == ["j"]


@pytest.mark.parametrize(("freed", "in_company"), [(3.0, False), (4.5, True), (None, True)])
def test_finds_a_quarantined_job_with_company(journals: Journals, freed: float | None, in_company: bool) -> None:
    lines = [claimed(1, "other", 1), claimed(4, "suspect", 3, quarantined=True), (9, "freed", "suspect", 3)]
    journals.write("a", *lines, *([(freed, "freed", "other", 1)] if freed else []))
    assert bool(journals.read().quarantined_in_company()) == in_company


def test_finds_a_job_beside_a_quarantined_one(journals: Journals) -> None:
    journals.write("a", claimed(1, "suspect", 3, quarantined=True), claimed(2, "other", 1))
    assert journals.read().quarantined_in_company() == ["suspect"]


def test_claims_are_found_by_time(journals: Journals) -> None:
    journals.write("a", claimed(1, "j", 1), claimed(7, "k", 1))
    journals.write("b", claimed(4, "j", 2))
    found = journals.read()
    again, first = found.next_claim("j", after=1.5), found.first_claim(after=5)
    assert (again and again.engine, first and first.job) == ("b", "k")
    assert found.next_claim("j", after=4.5) is None


def test_other_bytes_are_a_failure() -> None:
    ledger, case = Ledger(), Case(1, "plain", "a prompt", seed=1)
    right, wrong = ledger.open(case), ledger.open(case)
    right.images, wrong.images = case.expected(), Case(2, "plain", "a prompt", seed=2).expected()
    for entry in (right, wrong):
        ledger.close(entry, "images")
    assert ledger.failed == [wrong]
    assert ledger.in_flight == 0


def test_figure_that_misses_its_goal() -> None:
    report = Report("s")
    report.check_none("bad things", [])
    report.check_none("worse things", {"b", "a"})
    assert [(figure.held, figure.value) for figure in report.figures] == [(True, "0"), (False, "2: a, b")]


@pytest.mark.parametrize(("value", "allowed"), [(100, True), (110, True), (111, False)])
def test_slack(value: float, allowed: bool) -> None:
    assert Slack(share=0.1, least=5).allows(value, 100) == allowed


async def test_finds_what_is_left_in_redis(queue: JobQueue, redis_client: redis.asyncio.Redis) -> None:
    running, waiting = await submit(queue), await submit(queue)
    assert (await claim(queue)).job_id == running
    found = await RedisContents.read(redis_client)
    assert (found.waiting, found.running, found.entries, found.pending) == (1, 1, 2, 1)
    assert not found.is_idle
    assert found.consumers == {"engine-1"}
    assert {f"glimmer:job:{job}" for job in (running, waiting)} <= set(found.without_end)


async def test_nothing_is_left_of_ended_jobs(queue: JobQueue, redis_client: redis.asyncio.Redis) -> None:
    job = await submit(queue)
    await queue.commit(await claim(queue), RESULT)
    found = await RedisContents.read(redis_client)
    assert found.is_idle
    assert not found.without_end
    assert found.results == {job}
    assert found.blob_bytes > len(RESULT.images[0].data)
