"""Every error of the contract, over HTTP."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine

URL = "/v1/images/generations"


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, after checking that it is complete."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": ["x"]}, "prompt", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "63x64"}, "size", "invalid_value"),
        ({"size": "64x2049"}, "size", "invalid_value"),
        ({"size": "2048x511"}, "size", "invalid_value"),
        ({"size": "-64x64"}, "size", "invalid_value"),
        ({"size": "64x64\n"}, "size", "invalid_value"),
        ({"size": "٦٤x64"}, "size", "invalid_value"),
        ({"size": 64}, "size", "invalid_value"),
        ({"size": "64x64", "width": 65}, "width", "invalid_value"),
        ({"size": "64x64", "width": 64, "height": 65}, "height", "invalid_value"),
        ({"width": 64}, "width", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"response_format": "jpeg"}, "response_format", "invalid_value"),
        ({"response_format": "url", "stream": True}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"background": "red"}, "background", "invalid_value"),
        ({"stream": "false"}, "stream", "invalid_value"),
        ({"partial_images": True}, "partial_images", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"seed": -2}, "seed", "invalid_value"),
        ({"seed": 2**53}, "seed", "invalid_value"),
        ({"seed": 10**30}, "seed", "invalid_value"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "invalid_value"),
        ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 201}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": 20.1}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": True}, "guidance_scale", "invalid_value"),
        ({"negative_prompt": 1}, "negative_prompt", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"return_plan": 1}, "return_plan", "invalid_value"),
        ({"plan": []}, "plan", "invalid_value"),
        ({"plan": {"rows": 2}}, "plan.cols", "missing_required_parameter"),
        ({"priority": "urgent"}, "priority", "invalid_value"),
        ({"timeout": 0}, "timeout", "invalid_value"),
        ({"timeout": 3601}, "timeout", "invalid_value"),
        ({"quotes": "none"}, "quotes", "invalid_value"),
        ({"embed_prompt": "yes"}, "embed_prompt", "invalid_value"),
        ({"rewrite_prompt": True}, "rewrite_prompt", "invalid_value"),
        ({"image": "data:"}, "image", "unknown_parameter"),
        ({"complexity": "high"}, "complexity", "unsupported_parameter"),
        ({"svg": {"model": "x"}}, "svg", "unsupported_parameter"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"nonsense": None}, "nonsense", "unknown_parameter"),
    ],
)
async def test_bad_fields(
    client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    response = await client.post(URL, json={"prompt": "x", **fields})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert stub.specs == []


async def test_bad_fields_are_named_even_without_an_engine(client: httpx.AsyncClient) -> None:
    for fields, param in (({"n": 0}, "n"), ({"size": "9x9"}, "size"), ({"stream": 1}, "stream")):
        assert error_of(await client.post(URL, json={"prompt": "x", **fields}))["param"] == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "it should have at least 1 character. prompt takes a string of 1..32000 characters."),
        ({"n": "2"}, "it should be a valid integer. n takes a number of images, 1..10."),
        ({"background": "red"}, 'it takes "auto" or "opaque".'),
        ({"plan": []}, 'it should be an object. plan takes {"rows", "cols", "tokens"}'),
        ({"plan": {"rows": 2, "cols": 2, "tokens": [1] * 4097}}, "it should have at most 4096 items. plan takes"),
        ({"size": "96x64", "plan": {"rows": 3, "cols": 2, "tokens": [1] * 6}}, "2 rows and 3 cols, not 3 and 2."),
    ],
)
async def test_messages_say_what_is_accepted(
    client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, Any], message: str
) -> None:
    assert message in error_of(await client.post(URL, json={"prompt": "x", **fields}))["message"]


async def test_messages_explain(client: httpx.AsyncClient) -> None:
    typo = await client.post(URL, json={"prompt": "x", "num_inference_step": 20})
    assert "Did you mean num_inference_steps?" in error_of(typo)["message"]
    assert "1..10" in error_of(await client.post(URL, json={"prompt": "x", "n": 99}))["message"]
    secret = await client.post(URL, json={"prompt": ["a secret prompt"]})
    assert "secret" not in secret.text


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'"x"', "application/json"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "application/json"),
        (b'{"prompt": "x", "guidance_scale": 1e999}', "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b'{"prompt": "x", "plan": ' + b"[" * 100_000, "application/json"),
        (b'{"prompt": "x", "plan": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001, "application/json"),
        (b'{"prompt": "x"}', "text/plain"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, stub: StubEngine, content: bytes, content_type: str) -> None:
    response = await client.post(URL, content=content, headers={"content-type": content_type})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("half", [rb"\ud800", rb"a\udc00b", rb"\ud800\ud800", b"\xed\xa0\x80"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "model"])
async def test_lone_surrogates_are_refused(client: httpx.AsyncClient, field: str, half: bytes) -> None:
    content = b'{"seed": 1, "prompt": "x", "%s": "%s"}' % (field.encode(), half)
    response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["param"] == field


@pytest.mark.parametrize("content", [rb'{"\ud800": 1}', rb'["\ud800"]', rb'{"prompt": "\ud800", "n": '])
async def test_lone_surrogates_outside_of_fields(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["param"]) == (400, None)


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1e300"])
@pytest.mark.parametrize("field", ["seed", "n", "width", "plan"])
async def test_integers_beyond_64_bits_are_refused(
    client: httpx.AsyncClient, stub: StubEngine, field: str, number: str
) -> None:
    value = f'{{"rows": 1, "cols": 1, "tokens": [{number}]}}' if field == "plan" else number
    headers = {"content-type": "application/json", "idempotency-key": "k"}
    response = await client.post(URL, content=f'{{"prompt": "x", "{field}": {value}}}', headers=headers)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"].startswith(field)


async def test_the_last_seed(client: httpx.AsyncClient, stub: StubEngine) -> None:
    response = await client.post(URL, json={"prompt": "x", "seed": 2**53 - 2, "n": 2})
    assert [image["seed"] for image in response.json()["data"]] == [2**53 - 2, 2**53 - 1]


async def test_body_size_is_bounded_while_reading(make_client: MakeClient, stub: StubEngine) -> None:
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            await asyncio.sleep(0.001)
            yield b" " * 1000

    async with make_client(max_body_bytes=4096) as client:
        declared = await client.post(URL, content=b" " * 5000, headers={"content-type": "application/json"})
        streamed = await client.post(URL, content=endless(), headers={"content-type": "application/json"})
    for response in (declared, streamed):
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert sent <= 8192


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/images/variations", 404, "not_found"),
        ("GET", URL, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    response = await client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


async def test_a_wrong_method_lists_the_allowed_ones(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/jobs/x")
    assert response.headers["allow"] == "GET, HEAD, DELETE"
    assert error_of(response)["message"] == "/v1/jobs/x does not accept POST; it accepts GET and DELETE."


async def test_unknown_model(client: httpx.AsyncClient, stub: StubEngine) -> None:
    posted = await client.post(URL, json={"prompt": "x", "model": "dall-e-3"})
    retrieved = await client.get("/v1/models/dall-e-3")
    for response in (posted, retrieved):
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "glm-image" in error["message"]


async def test_models(make_client: MakeClient) -> None:
    async with make_client(served_model_name="glm-image, zai-org/GLM-Image") as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/zai-org%2FGLM-Image")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["glm-image", "zai-org/GLM-Image"]
    assert one == listed["data"][1]
    assert set(one) == {"id", "object", "created", "owned_by"}


async def test_aliases_are_accepted(make_client: MakeClient, stub: StubEngine) -> None:
    async with make_client(served_model_name="glm-image,gpt-image-1") as client:
        assert (await client.post(URL, json={"prompt": "x", "model": "gpt-image-1"})).status_code == 200


async def test_keys(make_client: MakeClient, stub: StubEngine) -> None:
    async with make_client(api_key="s3cret") as client:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic s3cret"}):
            # The key is checked before the body.
            for response in (
                await client.post(URL, content=b"{", headers=headers),
                await client.get("/v1/models", headers=headers),
                await client.get("/v1/models/x", headers=headers),
            ):
                assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        headers = {"authorization": "Bearer s3cret"}
        assert (await client.post(URL, json={"prompt": "x"}, headers=headers)).status_code == 200
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert [(await client.get(path)).status_code for path in ("/health", "/live", "/metrics")] == [200, 200, 200]


async def test_an_unexpected_exception_reveals_nothing(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(queue, "submit", broken)
    response = await client.post(URL, json={"prompt": "x"})
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
