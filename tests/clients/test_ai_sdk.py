"""The Vercel AI SDK: `generateImage` with the image model of its provider for OpenAI-compatible servers."""

import base64
from typing import Any

import pytest

from engine.jobs.job import JobError
from tests.clients.client import ClientProcess, Raised, serving
from tests.clients.test_openai import MASK
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE, data_url

GENERATE = "generateImage"
MODEL = "zai-org/GLM-Image"


def options(**fields: Any) -> dict[str, Any]:
    """Return the extension fields in the form that the SDK sends."""
    return {"glimmer": fields}


def images(response: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["base64"]) for image in response["images"]]


async def test_generate(ai_sdk: ClientProcess, live_server: LiveServer, stub: StubEngine) -> None:
    ours = options(seed=4, quality="low", output_format="jpeg")
    response = await ai_sdk.call(
        live_server, GENERATE, model=MODEL, prompt="a fox", n=2, size="160x96", providerOptions=ours
    )
    [spec] = stub.specs
    assert (spec.width, spec.height, spec.num_inference_steps, spec.model) == (160, 96, 12, MODEL)
    assert images(response) == [stub_image(spec, seed) for seed in (4, 5)]
    assert {image["mediaType"] for image in response["images"]} == {"image/jpeg"}
    assert response["warnings"] == []
    assert response["usage"]["inputTokens"] == 2
    assert response["usage"]["outputTokens"] == spec.plan_tokens
    assert response["responses"][0]["headers"]["x-request-id"].startswith("req_")


async def test_more_images_than_fit_one_request(
    ai_sdk: ClientProcess, live_server: LiveServer, stub: StubEngine
) -> None:
    response = await ai_sdk.call(live_server, GENERATE, model=MODEL, prompt="a fox", n=12)
    assert sorted(spec.n for spec in stub.specs) == [2, 10]
    assert len(set(images(response))) == 12


async def test_urls(ai_sdk: ClientProcess, live_server: LiveServer, stub: StubEngine) -> None:
    """The SDK fetches the images itself, with its key."""
    ours = options(response_format="url", seed=4)
    response = await ai_sdk.call(live_server, GENERATE, model=MODEL, prompt="a fox", providerOptions=ours)
    assert images(response) == [stub_image(stub.specs[0], 4)]


@pytest.mark.parametrize("source_images", [[IMAGE], [IMAGE, data_url(IMAGE)]])
async def test_edit(
    ai_sdk: ClientProcess, live_server: LiveServer, stub: StubEngine, source_images: list[bytes | str]
) -> None:
    """One image is sent as `image`, several as `image[]`."""
    prompt = {"text": "bluer", "images": source_images, "mask": MASK}
    ours = options(seed=4, num_inference_steps=3)
    response = await ai_sdk.call(live_server, GENERATE, model=MODEL, prompt=prompt, n=2, providerOptions=ours)
    [spec], [sources] = stub.specs, stub.sources
    assert (spec.num_sources, spec.num_inference_steps) == (len(source_images), 3)
    assert sources
    assert sources.overlay
    assert images(response) == [stub_image(spec, seed, sources) for seed in (4, 5)]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"size": "63x64"}, 400, "size", "invalid_value"),
        ({"providerOptions": options(num_step=1)}, 400, "num_step", "unknown_parameter"),
        ({"prompt": {"text": "x", "images": [b"GIF89a"]}}, 400, "image", "invalid_image_file"),
        ({"model": "dall-e-2"}, 404, "model", "model_not_found"),
        ({"prompt": "broken"}, 500, None, "internal_error"),
        ({"providerOptions": options(timeout=0.001)}, 504, None, "deadline_exceeded"),
    ],
)
async def test_errors(
    ai_sdk: ClientProcess,
    live_server: LiveServer,
    queue: JobQueue,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str,
) -> None:
    """The message is the server's, unchanged."""
    async with StubEngine(queue, step_s=0.01) as stub:
        stub.failures = {"broken": JobError("Broken.", "server_error", "internal_error")}
        with pytest.raises(Raised) as caught:
            await ai_sdk.call(live_server, GENERATE, **{"model": MODEL, "prompt": "x", **fields})
    error = caught.value
    assert (error.kind, error["statusCode"]) == ("APICallError", status)
    said = error["data"]["error"]
    assert (said["message"], said["param"], said["code"]) == (error["message"], param, code)
    assert error["responseHeaders"]["x-request-id"].startswith("req_")


async def test_keys(ai_sdk: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    fields = {"model": "glm-image", "prompt": "x", "providerOptions": options(response_format="url")}
    async with serving(queue, api_key="right") as server:
        await ai_sdk.call(server, GENERATE, key="right", **fields)
        with pytest.raises(Raised) as caught:
            await ai_sdk.call(server, GENERATE, key="wrong", **fields)
    assert (caught.value["statusCode"], caught.value["isRetryable"]) == (401, False)


async def test_a_full_queue(ai_sdk: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    async with serving(queue, max_queue=0) as server:
        with pytest.raises(Raised) as caught:
            await ai_sdk.call(server, GENERATE, model="glm-image", prompt="x")
    assert (caught.value["statusCode"], caught.value["isRetryable"]) == (429, True)
    assert int(caught.value["responseHeaders"]["retry-after"]) > 0
