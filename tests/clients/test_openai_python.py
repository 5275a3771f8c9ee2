"""What only the official SDK for Python does."""

import asyncio
import base64
import inspect
from pathlib import Path
from typing import Any

import openai
import pytest

from server.requests.schemas import UNSUPPORTED, EditRequest, GenerationRequest
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE
from tests.waiting import until


def sdk(server: LiveServer, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**{"base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0, **options})


async def test_without_asyncio(live_server: LiveServer, stub: StubEngine) -> None:
    def generate() -> bytes:
        with openai.OpenAI(base_url=f"{live_server.url}/v1", api_key="any", max_retries=0) as client:
            response = client.images.generate(prompt="a fox", extra_body={"seed": 4})
        assert response.data
        return base64.b64decode(response.data[0].b64_json or "")

    assert await asyncio.to_thread(generate) == stub_image(stub.specs[0], 4)


@pytest.mark.parametrize("shape", ["path", "named", "of a kind", "list"])
async def test_files(live_server: LiveServer, stub: StubEngine, image_file: Path, shape: str) -> None:
    shapes: dict[str, Any] = {
        "path": image_file,
        "named": ("photo.jpg", IMAGE),
        "of a kind": ("photo.jpg", IMAGE, "image/jpeg"),
        "list": [image_file, ("photo.jpg", IMAGE), IMAGE],
    }
    async with sdk(live_server) as client:
        response = await client.images.edit(prompt="bluer", image=shapes[shape], extra_body={"seed": 4})
    assert response.data
    assert base64.b64decode(response.data[0].b64_json or "") == stub_image(stub.specs[0], 4, stub.sources[0])
    assert stub.specs[0].num_sources == (3 if shape == "list" else 1)


async def test_a_body_that_is_far_too_large(live_server: LiveServer, stub: StubEngine) -> None:
    """The client reads the response only after it has sent everything."""
    async with sdk(live_server) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.images.edit(prompt="x", image=bytes(200 * 2**20))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


async def test_a_client_that_disconnects_cancels_its_job(live_server: LiveServer, queue: JobQueue) -> None:
    async def is_empty() -> bool:
        stats = await queue.stats()
        return (stats.waiting, stats.running) == (0, 0)

    async with StubEngine(queue, step_s=60) as stub, sdk(live_server, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.images.generate(prompt="x")
        assert len(stub.specs) == 1
        await until(is_empty)


async def test_an_expired_request_is_not_retried(live_server: LiveServer, queue: JobQueue) -> None:
    """The SDK retries a 504 unless a header says otherwise."""
    async with StubEngine(queue, step_s=60) as stub, sdk(live_server, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.images.generate(prompt="x", extra_body={"timeout": 0.3})
    assert (caught.value.status_code, len(stub.specs)) == (504, 1)


@pytest.mark.parametrize(("method", "body"), [("generate", GenerationRequest), ("edit", EditRequest)])
def test_every_argument_is_a_known_field(method: str, body: type[GenerationRequest]) -> None:
    """Each is honoured, or refused with a reason."""
    arguments = inspect.signature(getattr(openai.AsyncOpenAI(api_key="any").images, method)).parameters.keys()
    own = {"timeout", "extra_headers", "extra_query", "extra_body"}
    assert {"prompt", "size", "stream"} < arguments
    assert arguments - own - body.model_fields.keys() - UNSUPPORTED.keys() == set()
