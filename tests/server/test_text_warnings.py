"""Warnings of quoted texts that the checkpoint cuts."""

from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.requests.text_warnings import MAX_WARNINGS, text_warnings
from tests.job_queue import JobQueue
from tests.server.events import events_of
from tests.server.stub_engine import StubEngine
from tests.server.test_edits import IMAGE, upload
from tests.server.test_jobs_api import ASYNC, ended

URL, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = 'top "GRAND OPENING", bottom "TODAY"'
WARNING = "quoted text 1 of 2 has 13 characters; the model draws the first 10"


@pytest.fixture
def stub(queue: JobQueue) -> StubEngine:
    stub = StubEngine(queue)
    stub.info = replace(stub.info, max_text_characters=10)
    return stub


@given(st.lists(st.text(st.characters(exclude_characters="\"'“”「」"), max_size=20), max_size=12), st.integers(1, 16))
def test_every_text_that_is_too_long_is_warned_of(texts: list[str], limit: int) -> None:
    warnings = text_warnings(" and ".join(f'"{text}"' for text in texts), "reference", limit)
    long = [(number, text) for number, text in enumerate(texts, 1) if len(text) > limit]
    assert len(warnings) == min(len(long), MAX_WARNINGS + 1)
    for (number, text), warning in zip(long, warnings[:MAX_WARNINGS], strict=False):
        assert warning.startswith(f"quoted text {number} of {len(texts)} has {len(text)} characters; ")
        assert warning.endswith(f"the first {limit}")


def test_a_checkpoint_that_names_no_limit_cuts_nothing() -> None:
    assert text_warnings(f'"{"A" * 1000}"', "strict", None) == []


async def test_every_response_has_the_warning(client: httpx.AsyncClient, stub: StubEngine) -> None:
    async with stub:
        answer = (await client.post(URL, json={"prompt": PROMPT, "n": 2})).json()
        assert answer["warnings"] == [WARNING]
        events = events_of(await client.post(URL, json={"prompt": PROMPT, "stream": True}))
        assert events.named[-1][1]["warnings"] == [WARNING]
        job = (await client.post(URL, json={"prompt": PROMPT}, headers=ASYNC)).json()
        assert (await ended(client, job["id"]))["result"]["warnings"] == [WARNING]
        edit = await client.post(EDITS, data={"prompt": PROMPT}, files=upload(("image", IMAGE)))
        assert edit.json()["warnings"] == [WARNING]


async def test_what_fits_has_none(client: httpx.AsyncClient, stub: StubEngine) -> None:
    async with stub:
        answer = await client.post(URL, json={"prompt": "it's \"TEN LETTER\", don't cut", "quotes": "strict"})
    assert "warnings" not in answer.json()
