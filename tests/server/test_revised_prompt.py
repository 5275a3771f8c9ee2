"""The routes and the prompt rewriter: when it is used, and the revised prompt in responses."""

from typing import Any

import httpx
import pytest

from tests.server.conftest import MakeClient
from tests.server.events import events_of
from tests.server.stub_engine import StubEngine
from tests.server.test_edits import IMAGE, upload
from tests.server.test_jobs_api import ASYNC, ended, key
from tests.server.test_rewriter import PROMPT, RICH, Endpoint, completion, serving

URL, EDITS = "/v1/images/generations", "/v1/images/edits"


async def test_every_response_contains_the_revised_prompt(make_client: MakeClient, stub: StubEngine) -> None:
    async with serving(Endpoint(completion(RICH))) as endpoint, make_client(prompt_rewriter=endpoint.url) as client:
        answer = await client.post(URL, json={"prompt": PROMPT, "n": 2})
        assert [image["revised_prompt"] for image in answer.json()["data"]] == [RICH, RICH]
        events = events_of(await client.post(URL, json={"prompt": PROMPT, "stream": True}))
        assert events.named[-1][1]["revised_prompt"] == RICH
        job = (await client.post(URL, json={"prompt": PROMPT}, headers=ASYNC)).json()
        assert (await ended(client, job["id"]))["result"]["data"][0]["revised_prompt"] == RICH
    assert [spec.prompt for spec in stub.specs] == [RICH] * 3


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (completion("nothing quoted"), {}),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", {}),
        (completion(RICH), {"rewrite_prompt": False}),
        (completion(RICH), {"plan": {"rows": 2, "cols": 3, "tokens": [0] * 6}}),
    ],
)
async def test_the_prompt_stays_as_it_is(
    make_client: MakeClient, stub: StubEngine, answer: bytes, fields: dict[str, Any]
) -> None:
    async with serving(Endpoint(answer)) as endpoint, make_client(prompt_rewriter=endpoint.url) as client:
        [image] = (await client.post(URL, json={"prompt": PROMPT, **fields})).json()["data"]
    assert "revised_prompt" not in image
    assert stub.specs[0].prompt == PROMPT
    assert len(endpoint.requests) == (0 if fields else 1)


async def test_an_edit_is_rewritten_only_on_request(make_client: MakeClient, stub: StubEngine) -> None:
    async with serving(Endpoint(completion(RICH))) as endpoint, make_client(prompt_rewriter=endpoint.url) as client:
        answers = [
            await client.post(EDITS, data={"prompt": PROMPT, **fields}, files=upload(("image", IMAGE)))
            for fields in ({}, {"rewrite_prompt": "true"})
        ]
    assert [answer.json()["data"][0].get("revised_prompt") for answer in answers] == [None, RICH]


async def test_a_repetition_is_not_rewritten_again(make_client: MakeClient, stub: StubEngine) -> None:
    async with serving(Endpoint(completion(RICH))) as endpoint, make_client(prompt_rewriter=endpoint.url) as client:
        first, again = [await client.post(URL, json={"prompt": PROMPT}, headers=key("k")) for _ in "ab"]
    assert first.content == again.content
    assert len(endpoint.requests) == 1


async def test_fields_are_checked_before_rewriting(make_client: MakeClient, stub: StubEngine) -> None:
    async with serving(Endpoint(completion(RICH))) as endpoint, make_client(prompt_rewriter=endpoint.url) as client:
        for fields in ({"n": 0}, {"plan": {"rows": 1, "cols": 1, "tokens": [0]}}):
            assert (await client.post(URL, json={"prompt": PROMPT, **fields})).status_code == 400
    assert endpoint.requests == []


async def test_no_rewriter(client: httpx.AsyncClient, stub: StubEngine) -> None:
    for rewrite, status in ((None, 200), (False, 200), (True, 400)):
        response = await client.post(URL, json={"prompt": PROMPT, "rewrite_prompt": rewrite})
        assert response.status_code == status
    assert [spec.prompt for spec in stub.specs] == [PROMPT, PROMPT]
