"""The API with results in object storage."""

import base64
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from engine.jobs.job import STORE_UNAVAILABLE, JobError
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.object_storage import ObjectStorage
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image


@pytest.fixture
async def server(storing_queue: JobQueue) -> AsyncIterator[LiveServer]:
    server = LiveServer(storing_queue, ServerSettings())
    yield server
    await server.stop()


@pytest.fixture
async def engine(storing_queue: JobQueue) -> AsyncIterator[StubEngine]:
    async with StubEngine(storing_queue) as engine:
        yield engine


@pytest.fixture
async def sdk(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as client:
        yield client


async def test_urls_lead_to_the_storage(
    sdk: openai.AsyncOpenAI, engine: StubEngine, browser: httpx.AsyncClient, object_storage: ObjectStorage, bucket: str
) -> None:
    answer = await sdk.images.generate(prompt="a fox", n=2, response_format="url", extra_body={"seed": 4})
    [spec] = engine.specs
    for seed, image in zip((4, 5), answer.data or (), strict=True):
        assert str(image.url).startswith(f"{object_storage.url}/{bucket}/results/")
        assert (await browser.get(str(image.url))).content == stub_image(spec, seed)


async def test_base64_and_streams_come_through_the_api(sdk: openai.AsyncOpenAI, engine: StubEngine) -> None:
    answer = await sdk.images.generate(prompt="a fox", extra_body={"seed": 4})
    [image] = answer.data or []
    assert base64.b64decode(image.b64_json or "") == stub_image(engine.specs[0], 4)
    events = [
        event async for event in await sdk.images.generate(
            prompt="a fox", stream=True, partial_images=1, extra_body={"seed": 4}
        )
    ]  # fmt: skip
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert base64.b64decode(events[-1].b64_json) == stub_image(engine.specs[1], 4)


@pytest.mark.parametrize("response_format", ["url", "b64_json"])
async def test_jobs(server: LiveServer, engine: StubEngine, browser: httpx.AsyncClient, response_format: str) -> None:
    body = {"prompt": "a fox", "seed": 4, "response_format": response_format}
    answer = await browser.post(f"{server.url}/v1/images/generations", json=body, headers={"prefer": "respond-async"})
    job = answer.json()
    while job["status"] not in ("succeeded", "failed"):
        job = (await browser.get(f"{server.url}/v1/jobs/{job['id']}")).json()
    [image] = job["result"]["data"]
    if response_format == "url":
        data = (await browser.get(image["url"])).content
    else:
        data = base64.b64decode(image["b64_json"])
    assert data == stub_image(engine.specs[0], 4)


async def test_a_job_that_could_not_be_stored_may_be_sent_again(sdk: openai.AsyncOpenAI, engine: StubEngine) -> None:
    engine.failures["a fox"] = JobError("Try again.", code=STORE_UNAVAILABLE)
    with pytest.raises(openai.InternalServerError) as raised:
        await sdk.images.generate(prompt="a fox")
    assert (raised.value.status_code, raised.value.code) == (503, STORE_UNAVAILABLE)


@pytest.fixture
async def mortal_server(mortal_queue: JobQueue) -> AsyncIterator[LiveServer]:
    server = LiveServer(mortal_queue, ServerSettings())
    async with StubEngine(mortal_queue):
        yield server
        await server.stop()


async def test_while_the_storage_is_away_jobs_are_read_later(
    mortal_storage: ObjectStorage, mortal_server: LiveServer, browser: httpx.AsyncClient
) -> None:
    answer = await browser.post(
        f"{mortal_server.url}/v1/images/generations", json={"prompt": "a fox"}, headers={"prefer": "respond-async"}
    )
    url = f"{mortal_server.url}/v1/jobs/{answer.json()['id']}"
    while (await browser.get(url)).json()["status"] != "succeeded":
        pass
    mortal_storage.kill()
    away = await browser.get(url)
    assert away.status_code == 503, away.text
    assert (await browser.get(f"{mortal_server.url}/v1/models")).status_code == 200
