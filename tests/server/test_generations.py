"""POST /v1/images/generations when it succeeds: every field reaches the engine; the response follows the contract."""

import base64
import io
import time
from dataclasses import replace

import httpx
import pytest
from PIL import Image

from engine.jobs.follower import JobFollower
from engine.jobs.job import JobError, JobRecord, JobSpec
from server.requests.schemas import UNSUPPORTED
from server.requests.validation import STEPS_BY_QUALITY
from tests.job_queue import JobQueue
from tests.server.stub_engine import CODEBOOK_SIZE, DEFAULT_SIZE, StubEngine, plan_for, stub_image

URL = "/v1/images/generations"
OPTIONAL_FIELDS = [
    "model",
    "n",
    "size",
    "quality",
    "response_format",
    "output_format",
    "output_compression",
    "background",
    "stream",
    "partial_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "temperature",
    "top_p",
    "return_plan",
    "plan",
    "embed_prompt",
    "quotes",
    "rewrite_prompt",
    "priority",
    "timeout",
    "width",
    "height",
    "input_fidelity",
    "moderation",
    "style",
    "user",
    "safety_identifier",
    "extra_headers",
]


async def test_response_follows_the_contract(client: httpx.AsyncClient, stub: StubEngine) -> None:
    before = int(time.time())
    response = await client.post(URL, json={"prompt": "a red fox", "size": "128x64", "seed": 42})
    body = response.json()
    assert response.status_code == 200
    assert before <= body.pop("created") <= time.time()
    spec = stub.specs[0]
    assert body == {
        "background": "opaque",
        "output_format": "png",
        "quality": "high",
        "size": "128x64",
        "data": [{"b64_json": base64.b64encode(stub_image(spec, 42)).decode(), "seed": 42}],
        "usage": {
            "total_tokens": 3 + spec.plan_tokens,
            "input_tokens": 3,
            "output_tokens": spec.plan_tokens,
            "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": spec.plan_tokens},
        },
    }


async def test_every_field_reaches_the_engine(client: httpx.AsyncClient, stub: StubEngine) -> None:
    body = {
        "prompt": "a sign",
        "n": 2,
        "size": "128x96",
        "seed": 7,
        "num_inference_steps": 9,
        "guidance_scale": 3,
        "negative_prompt": "blur",
        "temperature": 0,
        "top_p": 0.5,
        "return_plan": True,
        "output_format": "webp",
        "output_compression": 80,
        "priority": "batch",
        "timeout": 30,
        "model": "glm-image",
        "quality": "low",
        "user": "u",
        "partial_images": 3,
        "embed_prompt": True,
        "quotes": "strict",
    }
    assert (await client.post(URL, json=body)).status_code == 200
    assert stub.specs == [
        JobSpec(
            prompt="a sign",
            width=128,
            height=96,
            seed=7,
            n=2,
            num_inference_steps=9,
            guidance_scale=3.0,
            negative_prompt="blur",
            temperature=0.0,
            top_p=0.5,
            return_plan=True,
            output_format="webp",
            output_compression=80,
            partial_images=0,  # the client cannot receive them
            model="glm-image",
            embed_prompt=True,
            quotes="strict",
        )
    ]


async def test_null_means_absent(client: httpx.AsyncClient, stub: StubEngine) -> None:
    nulls = dict.fromkeys((*OPTIONAL_FIELDS, *UNSUPPORTED))
    without_effect = {"moderation": "low", "style": "vivid", "user": "me", "input_fidelity": "high"}
    responses = [
        await client.post(URL, json={"prompt": "a fox", **extra, "seed": 1})
        for extra in ({}, nulls, {**without_effect, "extra_headers": {"x-a": "b"}})
    ]
    assert [response.status_code for response in responses] == [200, 200, 200]
    assert stub.specs[0] == stub.specs[1] == stub.specs[2]


async def test_the_list_of_optional_fields_is_complete(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()["components"]["schemas"]["GenerationRequest"]
    assert set(schema["properties"]) == {"prompt", *OPTIONAL_FIELDS}
    assert schema["required"] == ["prompt"]
    assert all({"type": "null"} in schema["properties"][name]["anyOf"] for name in OPTIONAL_FIELDS)


@pytest.mark.parametrize("n", [1, 4, 10])
async def test_n_images_with_consecutive_seeds(client: httpx.AsyncClient, stub: StubEngine, n: int) -> None:
    data = (await client.post(URL, json={"prompt": "foxes", "n": n, "seed": 5})).json()["data"]
    assert [image["seed"] for image in data] == list(range(5, 5 + n))
    assert len({image["b64_json"] for image in data}) == n


async def test_a_seed_is_drawn_when_none_is_given(client: httpx.AsyncClient, stub: StubEngine) -> None:
    seeds = [(await client.post(URL, json={"prompt": "x"})).json()["data"][0]["seed"] for _ in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("quality", "named", "steps"),
    [*((name, name, steps) for name, steps in STEPS_BY_QUALITY.items()), ("auto", "high", 50), ("hd", "high", 50)],
)
async def test_quality_is_a_number_of_steps(
    client: httpx.AsyncClient, stub: StubEngine, quality: str, named: str, steps: int
) -> None:
    body = (await client.post(URL, json={"prompt": "x", "quality": quality})).json()
    assert body["quality"] == named
    assert stub.specs[0].num_inference_steps == steps


@pytest.mark.parametrize(
    ("fields", "steps", "guidance"),
    [
        ({}, 7, 4.5),
        ({"quality": "auto"}, 7, 4.5),
        ({"quality": None, "num_inference_steps": None, "guidance_scale": None}, 7, 4.5),
        ({"quality": "high"}, 50, 4.5),
        ({"quality": "standard"}, 25, 4.5),
        ({"num_inference_steps": 3}, 3, 4.5),
        ({"guidance_scale": 0}, 7, 0),
        ({"guidance_scale": 1.5}, 7, 1.5),
    ],
)
async def test_defaults_are_the_checkpoint_s(
    client: httpx.AsyncClient, queue: JobQueue, fields: dict[str, object], steps: int, guidance: float
) -> None:
    stub = StubEngine(queue)
    stub.info = replace(stub.info, default_steps=7, default_guidance=4.5)
    async with stub:
        assert (await client.post(URL, json={"prompt": "x", **fields})).status_code == 200
    assert (stub.specs[0].num_inference_steps, stub.specs[0].guidance_scale) == (steps, guidance)


async def test_an_engine_without_defaults_uses_the_published_model_s(
    client: httpx.AsyncClient, stub: StubEngine
) -> None:
    assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
    assert (stub.specs[0].num_inference_steps, stub.specs[0].guidance_scale) == (50, 1.5)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, DEFAULT_SIZE),
        ({"size": "auto"}, DEFAULT_SIZE),
        ({"size": "100x70"}, "100x70"),
        ({"size": "100x70", "width": 100, "height": 70}, "100x70"),
        ({"size": "100x70", "width": 100}, "100x70"),
        ({"width": 80, "height": 160}, "80x160"),
        ({"size": "2048x512"}, "2048x512"),
    ],
)
async def test_sizes(client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, object], size: str) -> None:
    body = (await client.post(URL, json={"prompt": "x", **fields})).json()
    assert body["size"] == size
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert f"{image.width}x{image.height}" == size


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_output_formats(client: httpx.AsyncClient, stub: StubEngine, output_format: str) -> None:
    body = (await client.post(URL, json={"prompt": "x", "output_format": output_format})).json()
    assert body["output_format"] == output_format
    assert Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).format == output_format.upper()


async def test_a_returned_plan_can_be_sent_again(client: httpx.AsyncClient, stub: StubEngine) -> None:
    first = await client.post(URL, json={"prompt": "x", "size": "128x64", "seed": 3, "return_plan": True})
    plan = first.json()["data"][0]["plan"]
    assert plan == plan_for(stub.specs[0], 3).to_dict()
    second = await client.post(URL, json={"prompt": "x", "size": "128x64", "plan": plan, "return_plan": True})
    assert second.json()["data"][0]["plan"] == plan
    assert stub.specs[1].plan == plan
    assert second.json()["usage"]["output_tokens"] == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"rows": 3}, "plan"),
        ({"tokens": [0] * 7}, "plan.tokens"),
        ({"tokens": [CODEBOOK_SIZE] * 8}, "plan.tokens"),
        ({"tokens": [-1] * 8}, "plan.tokens.0"),
        ({"tokens": [True] * 8}, "plan.tokens.0"),
        ({"tokens": "0"}, "plan.tokens"),
        ({"preview": {"rows": 1, "cols": 1, "tokens": [0]}}, "plan.preview"),
        ({"colour": 1}, "plan.colour"),
    ],
)
async def test_plans_that_do_not_fit(
    client: httpx.AsyncClient, stub: StubEngine, change: dict[str, object], param: str
) -> None:
    plan = {"rows": 2, "cols": 4, "tokens": [0] * 8, **change}
    response = await client.post(URL, json={"prompt": "x", "size": "128x64", "plan": plan})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_large_responses_are_complete(
    client: httpx.AsyncClient, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.responses.images.LARGE_RESPONSE_BYTES", 10)
    body = (await client.post(URL, json={"prompt": "x", "n": 3, "seed": 1})).json()
    assert [base64.b64decode(image["b64_json"]) for image in body["data"]] == [
        stub_image(stub.specs[0], seed) for seed in (1, 2, 3)
    ]


async def test_headers(client: httpx.AsyncClient, stub: StubEngine) -> None:
    sent = await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "my-id.1"})
    made = await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "not sane"})
    assert sent.headers["x-request-id"] == "my-id.1"
    assert made.headers["x-request-id"].startswith("req_")
    assert int(sent.headers["openai-processing-ms"]) >= 0


async def test_engine_refusals_and_failures(client: httpx.AsyncClient, stub: StubEngine) -> None:
    stub.failures = {
        "long": JobError("The prompt is too long.", "invalid_request_error", "invalid_value", "prompt"),
        "oom": JobError("Out of memory.", "server_error", "out_of_memory"),
    }
    refused = await client.post(URL, json={"prompt": "long"})
    failed = await client.post(URL, json={"prompt": "oom"})
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        {
            "message": "The prompt is too long.",
            "type": "invalid_request_error",
            "code": "invalid_value",
            "param": "prompt",
        },
    )
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "out_of_memory")


async def test_the_deadline_ends_a_request(client: httpx.AsyncClient, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=10):
        started = time.monotonic()
        response = await client.post(URL, json={"prompt": "x", "timeout": 0.3})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"
    assert time.monotonic() - started < 2


async def test_a_job_cancelled_by_another_client(
    client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = JobFollower.wait

    async def cancelled(self: JobFollower) -> JobRecord:
        await queue.cancel(self._job_id)
        return await wait(self)

    monkeypatch.setattr(JobFollower, "wait", cancelled)
    async with StubEngine(queue, step_s=10):
        response = await client.post(URL, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "job_cancelled")


async def test_a_missing_result_is_an_internal_error(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        return None

    monkeypatch.setattr(queue, "stored_result", gone)
    response = await client.post(URL, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
