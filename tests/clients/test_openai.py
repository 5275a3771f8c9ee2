"""What the official SDKs for Python and for Node have in common."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.jobs.job import JobError
from tests.clients.client import Client, Raised, serving
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.image_files import file_of, plain
from tests.server.stub_engine import StubEngine, partial_image, stub_image
from tests.server.test_edits import IMAGE, data_url
from tests.waiting import until

GENERATE, EDIT = "images.generate", "images.edit"

MASK = file_of(plain(colour=(0, 0, 0, 0), mode="RGBA"))
REFUSED = JobError("No.", "invalid_request_error", "invalid_value", "prompt")
BROKEN = JobError("Broken.", "server_error", "internal_error")
INVALID = "invalid_request_error"

BUSY = ("RateLimitError", 429, "rate_limit_error", None, "rate_limit_exceeded")


def image(response: dict[str, Any], index: int = 0) -> bytes:
    return base64.b64decode(response["data"][index]["b64_json"])


def facts(error: Raised) -> tuple[str, int, str, str | None, str | None]:
    """Return class, status, type, param and code of an error, after checking its message and request id."""
    assert error["error"]["message"] in error["message"]
    assert error["requestID"].startswith("req_")
    return error.kind, error["status"], error["type"], error["param"], error["code"]


class TestGenerate:
    async def test_images(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        fields = {"n": 2, "size": "160x96", "quality": "low", "output_format": "webp", "seed": 4}
        response = await sdk.call(live_server, GENERATE, prompt="a fox", **fields)
        [spec] = stub.specs
        assert (spec.width, spec.height, spec.num_inference_steps, spec.output_format) == (160, 96, 12, "webp")
        assert [image(response, index) for index in (0, 1)] == [stub_image(spec, seed) for seed in (4, 5)]
        assert [item["seed"] for item in response["data"]] == [4, 5]
        assert response["usage"]["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 0}
        assert response["_request_id"].startswith("req_")

    async def test_request_ids_may_come_from_the_client(
        self, sdk: Client, live_server: LiveServer, stub: StubEngine
    ) -> None:
        response = await sdk.call(live_server, GENERATE, prompt="x", headers={"X-Request-ID": "mine-1"})
        assert response["_request_id"] == "mine-1"

    async def test_urls(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        response = await sdk.call(live_server, GENERATE, prompt="a fox", response_format="url", seed=4)
        async with httpx.AsyncClient() as browser:
            assert (await browser.get(response["data"][0]["url"])).content == stub_image(stub.specs[0], 4)

    async def test_null_means_unset(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        names = ("n", "size", "background", "complexity", "frame_count", "output_format", "svg", "seed")
        response = await sdk.call(live_server, GENERATE, prompt="a fox", quality="auto", **dict.fromkeys(names))
        assert len(response["data"]) == 1

    async def test_repetitions(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        headers = {"Idempotency-Key": "k"}
        first, again = [await sdk.call(live_server, GENERATE, prompt="x", headers=headers) for _ in "ab"]
        assert first["data"] == again["data"]
        assert len(stub.specs) == 1


class TestEdit:
    @pytest.mark.parametrize("shape", ["file", "bytes", "one file", "one of bytes", "two files", "both"])
    async def test_images(
        self, sdk: Client, live_server: LiveServer, stub: StubEngine, image_file: Path, shape: str
    ) -> None:
        images = {
            "file": image_file,
            "bytes": IMAGE,
            "one file": [image_file],
            "one of bytes": [IMAGE],
            "two files": [image_file, image_file],
            "both": [IMAGE, image_file, IMAGE, IMAGE],
        }[shape]
        response = await sdk.call(live_server, EDIT, prompt="bluer", image=images, n=2, seed=4)
        [spec], [sources] = stub.specs, stub.sources
        assert spec.num_sources == (len(images) if isinstance(images, list) else 1)
        assert [image(response, index) for index in (0, 1)] == [stub_image(spec, seed, sources) for seed in (4, 5)]
        assert response["usage"]["input_tokens_details"]["image_tokens"] == spec.source_tokens > 0

    async def test_data_urls(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        response = await sdk.call(live_server, EDIT, prompt="bluer", image=data_url(IMAGE).encode(), seed=4)
        assert image(response) == stub_image(stub.specs[0], 4, stub.sources[0])

    async def test_masks(self, sdk: Client, live_server: LiveServer, stub: StubEngine, image_file: Path) -> None:
        await sdk.call(live_server, EDIT, prompt="bluer", image=image_file, mask=MASK, size="1024x1024")
        [sources] = stub.sources
        assert sources
        assert sources.overlay

    async def test_extensions(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        plan = {"rows": 2, "cols": 3, "tokens": [0, 1, 2, 3, 4, 5]}
        extensions = {"plan": plan, "num_inference_steps": 3, "guidance_scale": 2.5, "return_plan": True}
        response = await sdk.call(live_server, EDIT, prompt="x", image=IMAGE, **extensions)
        [spec] = stub.specs
        assert {name: getattr(spec, name) for name in extensions} == extensions
        assert response["data"][0]["plan"] == plan


class TestStream:
    async def test_generation(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        events = await sdk.call(live_server, GENERATE, prompt="a fox", stream=True, partial_images=2, seed=4)
        [spec] = stub.specs
        kinds = ("partial_image", "partial_image", "completed")
        assert [event["type"] for event in events] == [f"image_generation.{kind}" for kind in kinds]
        assert [event["partial_image_index"] for event in events[:2]] == [0, 1]
        wanted = [partial_image(spec, 0, 0).data, partial_image(spec, 0, 1).data, stub_image(spec, 4)]
        assert [base64.b64decode(event["b64_json"]) for event in events] == wanted
        assert events[-1]["usage"]["input_tokens_details"]["text_tokens"] == 2

    async def test_edit(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        fields = {"image": [IMAGE], "stream": True, "partial_images": 1, "seed": 4}
        events = await sdk.call(live_server, EDIT, prompt="x", **fields)
        assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert base64.b64decode(events[-1]["b64_json"]) == stub_image(stub.specs[0], 4, stub.sources[0])

    async def test_errors(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        """An error before the first event has a status and its class; a later one has the other fields."""
        stub.failures = {"refused": REFUSED}
        with pytest.raises(Raised) as early:
            await sdk.call(live_server, GENERATE, prompt="x", stream=True, n=11)
        assert facts(early.value) == ("BadRequestError", 400, INVALID, "n", "invalid_value")
        with pytest.raises(Raised, match=r"No\.") as late:
            await sdk.call(live_server, GENERATE, prompt="refused", stream=True)
        assert (late.value.kind, late.value["param"], late.value["code"]) == ("APIError", "prompt", "invalid_value")


async def test_models(sdk: Client, live_server: LiveServer) -> None:
    models = await sdk.call(live_server, "models.list")
    assert [model["id"] for model in models] == ["glm-image", "zai-org/GLM-Image"]
    assert (await sdk.call(live_server, "models.retrieve", "zai-org/GLM-Image"))["owned_by"] == "glimmer"
    with pytest.raises(Raised) as caught:
        await sdk.call(live_server, "models.retrieve", "other")
    assert facts(caught.value) == ("NotFoundError", 404, INVALID, "model", "model_not_found")


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"n": 11}, ("BadRequestError", 400, INVALID, "n", "invalid_value")),
            ({"num_step": 1}, ("BadRequestError", 400, INVALID, "num_step", "unknown_parameter")),
            ({"svg": {"model": "x"}}, ("BadRequestError", 400, INVALID, "svg", "unsupported_parameter")),
            ({"prompt": "refused"}, ("BadRequestError", 400, INVALID, "prompt", "invalid_value")),
            ({"model": "dall-e-2"}, ("NotFoundError", 404, INVALID, "model", "model_not_found")),
            ({"prompt": "broken"}, ("InternalServerError", 500, "server_error", None, "internal_error")),
            ({"timeout": 0.001}, ("InternalServerError", 504, "server_error", None, "deadline_exceeded")),
        ],
    )
    async def test_generations(
        self, sdk: Client, live_server: LiveServer, queue: JobQueue, fields: dict[str, Any], error: tuple[Any, ...]
    ) -> None:
        async with StubEngine(queue, step_s=0.01) as stub:
            stub.failures = {"refused": REFUSED, "broken": BROKEN}
            with pytest.raises(Raised) as caught:
                await sdk.call(live_server, GENERATE, **{"prompt": "x", **fields})
        assert facts(caught.value) == error

    @pytest.mark.parametrize(
        ("fields", "param", "code"),
        [
            ({"image": b"GIF89a"}, "image", "invalid_image_file"),
            ({"image": [IMAGE, IMAGE[:50]]}, "image", "invalid_image_file"),
            ({"image": [IMAGE] * 5}, "image", "invalid_value"),
            ({"mask": IMAGE}, "mask", "invalid_image_file"),
            ({"markup": IMAGE}, "markup", "unsupported_parameter"),
            ({"svg": {"model": "x"}}, "svg", "unsupported_parameter"),
            ({"n": 11}, "n", "invalid_value"),
        ],
    )
    async def test_edits(
        self, sdk: Client, live_server: LiveServer, stub: StubEngine, fields: dict[str, Any], param: str, code: str
    ) -> None:
        with pytest.raises(Raised) as caught:
            await sdk.call(live_server, EDIT, **{"prompt": "x", "image": IMAGE, **fields})
        kind = "image_generation_user_error" if code == "invalid_image_file" else INVALID
        assert facts(caught.value) == ("BadRequestError", 400, kind, param, code)
        assert stub.specs == []

    async def test_keys_and_their_limits(self, sdk: Client, queue: JobQueue, stub: StubEngine, key_file: Path) -> None:
        async with serving(queue, api_keys_file=key_file) as server:

            async def refusal(method: str, key: str, **fields: Any) -> tuple[Any, ...]:
                with pytest.raises(Raised) as caught:
                    await sdk.call(server, method, key=key, **fields)
                return facts(caught.value)

            unknown = ("AuthenticationError", 401, INVALID, None, "invalid_api_key")
            assert await refusal("models.list", "wrong") == unknown
            assert await refusal(GENERATE, "wrong", prompt="x") == unknown
            assert await refusal(EDIT, "wrong", prompt="x", image=IMAGE) == unknown
            large = await refusal(GENERATE, "limited", prompt="x", size="1024x1024")
            assert large == ("RateLimitError", 429, "insufficient_quota", None, "insufficient_quota")
            await sdk.call(server, GENERATE, key="limited", prompt="x")
            assert await refusal(GENERATE, "limited", prompt="x") == BUSY

    async def test_a_full_queue(self, sdk: Client, queue: JobQueue, stub: StubEngine) -> None:
        async with serving(queue, max_queue=0) as server:
            with pytest.raises(Raised) as caught:
                await sdk.call(server, GENERATE, prompt="x")
        assert facts(caught.value) == BUSY

    async def test_a_server_without_an_engine(self, sdk: Client, live_server: LiveServer) -> None:
        with pytest.raises(Raised) as caught:
            await sdk.call(live_server, GENERATE, prompt="x")
        assert facts(caught.value) == ("InternalServerError", 503, "server_error", None, "service_unavailable")

    async def test_a_job_cancelled_by_another_client(
        self, sdk: Client, live_server: LiveServer, queue: JobQueue
    ) -> None:
        headers = {"Idempotency-Key": "k"}
        async with StubEngine(queue, step_s=60) as stub, httpx.AsyncClient(base_url=live_server.url) as other:
            waiting = asyncio.create_task(sdk.call(live_server, GENERATE, prompt="x", headers=headers))
            await until(lambda: stub.specs)
            asked = {**headers, "Prefer": "respond-async"}
            job = await other.post("/v1/images/generations", json={"prompt": "x"}, headers=asked)
            await other.delete(f"/v1/jobs/{job.json()['id']}")
            with pytest.raises(Raised) as caught:
                await waiting
        assert facts(caught.value) == ("ConflictError", 409, INVALID, None, "job_cancelled")

    async def test_another_body_with_the_same_key(self, sdk: Client, live_server: LiveServer, stub: StubEngine) -> None:
        headers = {"Idempotency-Key": "k"}
        await sdk.call(live_server, GENERATE, prompt="x", headers=headers)
        with pytest.raises(Raised) as caught:
            await sdk.call(live_server, GENERATE, prompt="y", headers=headers)
        wanted = ("UnprocessableEntityError", 422, INVALID, "Idempotency-Key", "idempotency_key_reused")
        assert facts(caught.value) == wanted

    async def test_a_body_that_is_too_large(self, sdk: Client, queue: JobQueue, stub: StubEngine) -> None:
        """The client gets the response while it is still sending."""
        async with serving(queue, max_upload_bytes=2**20) as server:
            with pytest.raises(Raised) as caught:
                await sdk.call(server, EDIT, prompt="x", image=bytes(16 * 2**20))
        assert facts(caught.value)[1:] == (413, INVALID, None, "request_too_large")

    async def test_unknown_routes_and_models(self, sdk: Client, live_server: LiveServer) -> None:
        with pytest.raises(Raised) as caught:
            await sdk.call(live_server, "chat.completions.create", model="glm-image", messages=[])
        assert facts(caught.value) == ("NotFoundError", 404, INVALID, None, "not_found")
