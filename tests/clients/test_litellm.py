"""LiteLLM: `image_generation` and `image_edit` with a model of its provider for OpenAI-compatible servers."""

import base64
from pathlib import Path
from typing import Any

import pytest

from engine.jobs.job import JobError
from tests.clients.client import ClientProcess, Raised, serving
from tests.clients.test_openai import MASK
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE

MODEL = "openai/zai-org/GLM-Image"  # LiteLLM removes the part before the first slash


def images(response: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["b64_json"]) for image in response["data"]]


@pytest.mark.parametrize("method", ["image_generation", "aimage_generation"])
async def test_generate(litellm: ClientProcess, live_server: LiveServer, stub: StubEngine, method: str) -> None:
    fields = {"n": 2, "size": "160x96", "quality": "low", "output_format": "webp", "seed": 4}
    response = await litellm.call(live_server, method, model=MODEL, prompt="a fox", **fields)
    [spec] = stub.specs
    assert (spec.width, spec.height, spec.num_inference_steps, spec.output_format) == (160, 96, 12, "webp")
    assert spec.model == "zai-org/GLM-Image"
    assert images(response) == [stub_image(spec, seed) for seed in (4, 5)]
    assert response["usage"]["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 0}


async def test_headers(litellm: ClientProcess, live_server: LiveServer, stub: StubEngine) -> None:
    calls = [("image_generation", {}), ("image_edit", {"image": IMAGE})]
    for method, fields in calls:
        first, again = [
            await litellm.call(
                live_server, method, model=MODEL, prompt="x", headers={"Idempotency-Key": method}, **fields
            )
            for _ in "ab"
        ]
        assert images(first) == images(again)
    assert len(stub.specs) == len(calls)


@pytest.mark.parametrize("method", ["image_edit", "aimage_edit"])
@pytest.mark.parametrize("shape", ["file", "bytes", "list"])
async def test_edit(
    litellm: ClientProcess, live_server: LiveServer, stub: StubEngine, image_file: Path, method: str, shape: str
) -> None:
    image = {"file": image_file, "bytes": IMAGE, "list": [IMAGE, image_file]}[shape]
    fields = {"n": 2, "quality": "low", "response_format": "b64_json", "extra_body": {"seed": 4}}
    response = await litellm.call(live_server, method, model=MODEL, prompt="bluer", image=image, mask=MASK, **fields)
    [spec], [sources] = stub.specs, stub.sources
    assert (spec.num_sources, spec.num_inference_steps) == (2 if shape == "list" else 1, 12)
    assert sources
    assert sources.overlay
    assert images(response) == [stub_image(spec, seed, sources) for seed in (4, 5)]
    assert response["usage"]["input_tokens_details"]["image_tokens"] == spec.source_tokens


@pytest.mark.parametrize(
    ("fields", "kind", "status", "said"),
    [
        ({"n": 11}, "BadRequestError", 400, "n takes a number of images, 1..10"),
        ({"num_step": 1}, "BadRequestError", 400, "Unknown parameter: num_step"),
        ({"image": b"GIF89a"}, "BadRequestError", 400, "PNG, JPEG or WEBP"),
        ({"model": "openai/dall-e-2"}, "NotFoundError", 404, "Served: glm-image, zai-org/GLM-Image"),
        ({"prompt": "broken"}, "InternalServerError", 500, "Broken"),
        ({"extra_body": {"timeout": 0.001}}, "Timeout", 504, "did not finish within its timeout"),
    ],
)
async def test_errors(
    litellm: ClientProcess,
    live_server: LiveServer,
    queue: JobQueue,
    fields: dict[str, Any],
    kind: str,
    status: int,
    said: str,
) -> None:
    async with StubEngine(queue, step_s=0.01) as stub:
        stub.failures = {"broken": JobError("Broken.", "server_error", "internal_error")}
        method = "image_edit" if "image" in fields else "image_generation"
        with pytest.raises(Raised, match=said) as caught:
            await litellm.call(live_server, method, **{"model": MODEL, "prompt": "x", **fields})
    assert (caught.value.kind, caught.value["status_code"]) == (kind, status)


@pytest.mark.parametrize(("method", "fields"), [("image_generation", {}), ("image_edit", {"image": IMAGE})])
async def test_keys_and_their_limits(
    litellm: ClientProcess, queue: JobQueue, stub: StubEngine, key_file: Path, method: str, fields: dict[str, Any]
) -> None:
    fields = {"model": MODEL, "prompt": "x", "size": "1024x1024", **fields}
    async with serving(queue, api_keys_file=key_file, served_model_name="zai-org/GLM-Image") as server:
        with pytest.raises(Raised, match="The API key is not valid here") as unknown:
            await litellm.call(server, method, key="wrong", **fields)
        with pytest.raises(Raised, match="pixel-steps") as large:
            await litellm.call(server, method, key="limited", **fields)
    assert (unknown.value.kind, unknown.value["status_code"]) == ("AuthenticationError", 401)
    assert (large.value.kind, large.value["status_code"]) == ("RateLimitError", 429)


async def test_no_engine(litellm: ClientProcess, live_server: LiveServer) -> None:
    with pytest.raises(Raised, match="engine") as caught:
        await litellm.call(live_server, "image_generation", model="openai/glm-image", prompt="x")
    assert (caught.value.kind, caught.value["status_code"]) == ("ServiceUnavailableError", 503)
