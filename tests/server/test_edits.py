"""POST /v1/images/edits: forms and JSON, images and masks."""

import base64
import io
from typing import Any

import httpx
import pytest

from engine.geometry import source_tokens
from engine.jobs.job import JobSpec
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.image_files import file_of, opened, patterned, plain
from tests.server.stub_engine import StubEngine, plan_for, stub_image
from tests.server.test_errors import error_of

URL = "/v1/images/edits"
ASYNC = {"prefer": "respond-async"}
IMAGE = file_of(patterned())


def upload(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Return files for httpx, with a meaningless type as for raw bytes in the official SDK."""
    return [(name, ("upload", data, "application/octet-stream")) for name, data in files]


def data_url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


async def post(client: httpx.AsyncClient, *files: tuple[str, bytes], **fields: Any) -> httpx.Response:
    return await client.post(URL, data={"prompt": "bluer", **fields}, files=upload(*files or [("image", IMAGE)]))


async def test_response_follows_the_contract(client: httpx.AsyncClient, stub: StubEngine) -> None:
    response = await post(client, prompt="make it blue", seed="5")
    assert response.status_code == 200
    body, spec = response.json(), stub.specs[0]
    assert isinstance(body.pop("created"), int)
    tokens = source_tokens(96, 64)
    assert body == {
        "background": "opaque",
        "output_format": "png",
        "quality": "high",
        "size": "96x64",
        "data": [{"b64_json": base64.b64encode(stub_image(spec, 5, stub.sources[0])).decode(), "seed": 5}],
        "usage": {
            "total_tokens": 3 + tokens + spec.plan_tokens,
            "input_tokens": 3 + tokens,
            "output_tokens": spec.plan_tokens,
            "input_tokens_details": {"text_tokens": 3, "image_tokens": tokens},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": spec.plan_tokens},
        },
    }


async def test_every_field_of_a_form_reaches_the_engine(client: httpx.AsyncClient, stub: StubEngine) -> None:
    fields = {
        "n": "2",
        "size": "128x96",
        "seed": "7",
        "num_inference_steps": "9",
        "guidance_scale": "3",
        "negative_prompt": "blur",
        "temperature": "0",
        "top_p": "0.5",
        "return_plan": "true",
        "stream": "false",
        "output_format": "webp",
        "output_compression": "80",
        "priority": "batch",
        "timeout": "30.5",
        "model": "glm-image",
        "quality": "low",
        "input_fidelity": "high",
        "embed_prompt": "true",
        "quotes": "strict",
        "user": "7",
    }
    assert (await post(client, **fields)).status_code == 200
    assert stub.specs == [
        JobSpec(
            prompt="bluer",
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
            num_sources=1,
            source_tokens=source_tokens(96, 64),
            model="glm-image",
            embed_prompt=True,
            quotes="strict",
        )
    ]


@pytest.mark.parametrize("names", [["image"], ["image[]"], ["image[]"] * 4, ["image", "image[]", "image"]])
async def test_one_image_or_several(client: httpx.AsyncClient, stub: StubEngine, names: list[str]) -> None:
    source_images = [patterned(96 + 32 * number, 64) for number in range(len(names))]
    files = [(name, file_of(image)) for name, image in zip(names, source_images, strict=True)]
    response = await post(client, *files)
    assert response.status_code == 200
    assert response.json()["size"] == "96x64"
    [sources] = stub.sources
    assert sources is not None
    assert [opened(file).tobytes() for file in sources.files] == [image.tobytes() for image in source_images]
    assert stub.specs[0].num_sources == len(names)


async def test_parts_in_any_order(client: httpx.AsyncClient, stub: StubEngine) -> None:
    body = io.BytesIO()
    for name, head, data in (
        ("image", '; filename="a.gif"\r\nContent-Type: image/gif', IMAGE),
        ("prompt", "", "größer".encode()),
        ("seed", "\r\nContent-Type: text/plain; charset=utf-8", b"3"),
    ):
        body.write(f'--cut\r\nContent-Disposition: form-data; name="{name}"{head}\r\n\r\n'.encode() + data + b"\r\n")
    body.write(b"--cut--\r\n")
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    assert (await client.post(URL, content=body.getvalue(), headers=headers)).status_code == 200
    assert (stub.specs[0].prompt, stub.specs[0].seed) == ("größer", 3)


async def test_json_with_data_urls(client: httpx.AsyncClient, stub: StubEngine) -> None:
    jpeg = data_url(file_of(plain(), "JPEG"), "image/jpeg")
    for fields in (
        {"image": data_url(IMAGE)},
        {"image": [data_url(IMAGE, "text/plain;charset=x")]},
        {"image": {"image_url": data_url(IMAGE)}},
        {"images": [{"image_url": data_url(IMAGE)}]},
        {"image": [data_url(IMAGE), jpeg], "mask": None, "n": 1, "seed": None},
    ):
        response = await client.post(URL, json={"prompt": "bluer", **fields})
        assert response.status_code == 200, fields.keys()
    assert [spec.num_sources for spec in stub.specs] == [1, 1, 1, 1, 2]
    assert all(sources and opened(sources.files[0]).tobytes() == patterned().tobytes() for sources in stub.sources)


async def test_a_data_url_in_a_form(client: httpx.AsyncClient, stub: StubEngine) -> None:
    response = await client.post(URL, data={"prompt": "x"}, files={"image": (None, data_url(IMAGE))})
    assert response.status_code == 200
    assert stub.specs[0].num_sources == 1


async def test_a_mask_keeps_the_rest_of_the_image(client: httpx.AsyncClient, stub: StubEngine) -> None:
    mask = plain(96, 64, colour=(0, 0, 0, 255), mode="RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 48, 64))
    json = {"image": data_url(IMAGE), "mask": {"image_url": data_url(file_of(mask))}}
    for request in (
        post(client, ("image", IMAGE), ("mask", file_of(mask)), seed="1"),
        post(client, ("image[]", IMAGE), ("mask[]", file_of(mask)), seed="1"),
        client.post(URL, json={"prompt": "bluer", "seed": 1, **json}),
    ):
        body = (await request).json()
        edited = opened(base64.b64decode(body["data"][0]["b64_json"]))
        assert edited.crop((48, 0, 96, 64)).tobytes() == patterned().crop((48, 0, 96, 64)).tobytes()
        assert edited.getpixel((10, 10)) == opened(stub_image(stub.specs[0], 1, stub.sources[0])).getpixel((0, 0))
        assert edited.getpixel((10, 10)) != patterned().getpixel((10, 10))


@pytest.mark.parametrize("size", [None, "auto", "100x70"])
async def test_sizes(client: httpx.AsyncClient, stub: StubEngine, size: str | None) -> None:
    fields = {} if size is None else {"size": size}
    body = (await post(client, ("image", file_of(plain(170, 130))), **fields)).json()
    assert body["size"] == (size if size == "100x70" else "160x128")


async def test_an_edit_has_no_preview(client: httpx.AsyncClient, stub: StubEngine) -> None:
    plan = (await post(client, seed="3", return_plan="true")).json()["data"][0]["plan"]
    assert plan == plan_for(stub.specs[0], 3).to_dict()
    assert "preview" not in plan


async def test_a_plan_in_a_form(client: httpx.AsyncClient, stub: StubEngine) -> None:
    plan = {"rows": 2, "cols": 3, "tokens": [5, 4, 3, 2, 1, 0]}
    as_sdk = {"plan[rows]": "2", "plan[cols]": "3", "plan[tokens][]": ["5", "4", "3", "2", "1", "0"]}
    for fields in ({"plan": '{"rows": 2, "cols": 3, "tokens": [5, 4, 3, 2, 1, 0]}'}, as_sdk):
        assert (await post(client, **fields)).status_code == 200
    assert [spec.plan for spec in stub.specs] == [plan, plan]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"n": "2.5"}, "n", "invalid_value"),
        ({"n": "two"}, "n", "invalid_value"),
        ({"n": ""}, "n", "invalid_value"),
        ({"n": "٢"}, "n", "invalid_value"),
        ({"n": "0"}, "n", "invalid_value"),
        ({"n": "1" * 5000}, "n", "invalid_value"),
        ({"n": ["1", "1"]}, "n", "invalid_value"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream": "1"}, "stream", "invalid_value"),
        ({"seed": "0x10"}, "seed", "invalid_value"),
        ({"guidance_scale": "nan"}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": "1e999"}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": "1,5"}, "guidance_scale", "invalid_value"),
        ({"plan": "no json"}, "plan", "invalid_value"),
        ({"plan": "[1]"}, "plan", "invalid_value"),
        ({"plan": '{"rows": 2, "cols": 3, "tokens": [0]}'}, "plan.tokens", "invalid_value"),
        ({"plan[rows]": "2"}, "plan.cols", "missing_required_parameter"),
        ({"plan[rows]": ["2", "2"]}, "plan[rows]", "invalid_value"),
        ({"plan": "{}", "plan[rows]": "2"}, "plan", "invalid_value"),
        ({"plan[tokens][]": "x"}, "plan.rows", "missing_required_parameter"),
        ({"plan[colour]": "x"}, "plan[colour]", "unknown_parameter"),
        ({"size": "63x64"}, "size", "invalid_value"),
        ({"model": "dall-e-2"}, "model", "model_not_found"),
        ({"num_inference_step": "9"}, "num_inference_step", "unknown_parameter"),
        ({"images": "x"}, "images", "unknown_parameter"),
        ({"masks": "x"}, "masks", "unknown_parameter"),
        ({"frame_count": "2"}, "frame_count", "unsupported_parameter"),
        ({"svg[reasoning][effort]": "low"}, "svg", "unsupported_parameter"),
    ],
)
async def test_bad_fields_of_a_form(
    client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    response = await post(client, **fields)
    error = error_of(response)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert stub.specs == []


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "image", "missing_required_parameter"),
        ({"image": None}, "image", "missing_required_parameter"),
        ({"image": []}, "image", "missing_required_parameter"),
        ({"image": "https://example.org/a.png"}, "image", "invalid_value"),
        ({"image": "HTTP://169.254.169.254/"}, "image", "invalid_value"),
        ({"image": "file:///etc/passwd"}, "image", "invalid_value"),
        ({"image": "iVBORw0KGgo="}, "image", "invalid_value"),
        ({"image": "data:image/png,x"}, "image", "invalid_image_file"),
        ({"image": "data:image/png;base64,*"}, "image", "invalid_image_file"),
        ({"image": "data:image/png;base64,é"}, "image", "invalid_image_file"),
        ({"image": "data:image/png;base64,"}, "image", "invalid_image_file"),
        ({"image": data_url(b"not an image")}, "image", "invalid_image_file"),
        ({"image": 5}, "image", "invalid_value"),
        ({"image": {"file_id": "file-1"}}, "image", "invalid_value"),
        ({"image": [data_url(IMAGE)] * 17}, "image", "invalid_value"),
        ({"image": data_url(IMAGE), "images": [data_url(IMAGE)]}, "images", "invalid_value"),
        ({"image": data_url(IMAGE), "mask": "https://example.org/a.png"}, "mask", "invalid_value"),
        ({"image": data_url(IMAGE), "mask": [data_url(IMAGE)]}, "mask", "invalid_value"),
        ({"image": data_url(IMAGE), "mask": data_url(IMAGE)}, "mask", "invalid_image_file"),
        ({"image": data_url(IMAGE), "n": "2"}, "n", "invalid_value"),
        ({"image": data_url(IMAGE), "markup": data_url(IMAGE)}, "markup", "unsupported_parameter"),
        ({"image": data_url(IMAGE), "imag": 1}, "imag", "unknown_parameter"),
    ],
)
async def test_bad_fields_of_json(
    client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    response = await client.post(URL, json={"prompt": "x", **fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert stub.specs == []


async def test_messages_explain(client: httpx.AsyncClient, stub: StubEngine) -> None:
    fetched = await client.post(URL, json={"prompt": "x", "image": "https://example.org/a.png"})
    assert "data: URL" in error_of(fetched)["message"]
    typo = await client.post(URL, json={"prompt": "x", "imge": ""})
    assert "Did you mean image?" in error_of(typo)["message"]
    many = await post(client, *[("image[]", IMAGE)] * 17)
    assert (many.status_code, error_of(many)["param"]) == (400, "image")
    assert "1..4" in error_of(many)["message"]
    masks = await post(client, ("image", IMAGE), ("mask", IMAGE), ("mask", IMAGE))
    assert error_of(masks)["param"] == "mask"
    url_in_form = await post(client, ("image", b"https://example.org/a.png"))
    assert "does not fetch URLs" in error_of(url_in_form)["message"]
    file_as_text = await post(client, ("image", IMAGE), ("quality", b"low"))
    assert error_of(file_as_text)["param"] == "quality"
    invalid_text = await client.post(URL, files=[*upload(("image", IMAGE)), ("prompt", (None, b"\xff"))])
    assert error_of(invalid_text)["param"] == "prompt"


@pytest.mark.parametrize("cut", [0, 40, 200, len(IMAGE)])
async def test_truncated_forms(client: httpx.AsyncClient, cut: int) -> None:
    whole = client.build_request("POST", URL, data={"prompt": "x"}, files=upload(("image", IMAGE)))
    headers = {"content-type": whole.headers["content-type"]}
    response = await client.post(URL, content=whole.read()[:cut], headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (400, None)


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary="),
        (b"x", "multipart/form-data; boundary=" + "a" * 1000),
        (b"no form at all", "multipart/form-data; boundary=cut"),
        (b"--cut\r\nContent-Disposition: form-data\r\n\r\nx\r\n--cut--\r\n", "multipart/form-data; boundary=cut"),
        (b"--cut\r\nno header\r\n\r\nx\r\n--cut--\r\n", "multipart/form-data; boundary=cut"),
        (b"--cut\r\n" + b"a" * 100_000 + b": x\r\n\r\nx\r\n--cut--\r\n", "multipart/form-data; boundary=cut"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (IMAGE, "image/png"),
        (b"[]", "application/json"),
        (b"", "application/json"),
    ],
    ids=range(11),
)
async def test_bodies_that_are_not_edits(client: httpx.AsyncClient, content: bytes, content_type: str) -> None:
    response = await client.post(URL, content=content, headers={"content-type": content_type})
    assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")


async def test_too_many_parts(client: httpx.AsyncClient) -> None:
    part = b'--cut\r\nContent-Disposition: form-data; name="plan[tokens][]"\r\n\r\n1\r\n'
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    response = await client.post(URL, content=part * 10_001 + b"--cut--\r\n", headers=headers)
    assert response.status_code == 400
    assert "10000 parts" in error_of(response)["message"]


async def test_a_form_is_not_accepted_for_a_generation(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/images/generations", data={"prompt": "x"}, files=upload(("image", IMAGE)))
    assert response.status_code == 400


async def test_an_upload_has_its_own_limit(make_client: MakeClient, stub: StubEngine) -> None:
    async with make_client(max_body_bytes=1024, max_upload_bytes=200_000) as client:
        assert (await post(client, ("image", IMAGE + bytes(100_000)))).status_code == 200
        for response in (
            await post(client, ("image", IMAGE + bytes(200_000))),
            await client.post(URL, json={"prompt": "x", "image": data_url(IMAGE + bytes(200_000))}),
        ):
            assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


async def test_nothing_is_decoded_for_a_full_queue(
    make_client: MakeClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.image_files.decoders.Decoders.decode", None)
    async with make_client(max_queue=0) as client:
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        response = await post(client)
    assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")


async def test_without_an_engine_it_is_503(client: httpx.AsyncClient) -> None:
    assert (await post(client)).status_code == 503


async def test_the_memory_for_queued_source_images_is_limited(
    make_client: MakeClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for all edits together: the first is always accepted, other requests are not affected."""
    await queue.heartbeat(StubEngine(queue).info, "", 10)  # of an engine that claims nothing
    edit = {"data": {"prompt": "x"}, "files": upload(("image", IMAGE)), "headers": ASYNC}
    async with make_client(max_source_bytes=1) as client:
        first = await client.post(URL, **edit)
        assert first.status_code == 202
        held = (await queue.stats()).source_bytes
        async with make_client(max_source_bytes=held + 1) as with_a_byte_left:
            refused_with_it = await with_a_byte_left.post(URL, **edit)
        with monkeypatch.context() as patch:
            patch.setattr("server.image_files.decoders.Decoders.decode", None)  # nothing is decoded without room
            refused = await client.post(URL, **edit)
        for response in (refused_with_it, refused):
            assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
            assert "images of queued edits" in error_of(response)["message"]
            assert int(response.headers["retry-after"]) >= 1
        assert (await client.post("/v1/images/generations", json={"prompt": "x"}, headers=ASYNC)).status_code == 202
        assert f"glimmer_queue_source_bytes {float(held)}" in (await client.get("/metrics")).text
        assert (await client.delete(first.headers["location"])).status_code == 200
        assert (await client.post(URL, **edit)).status_code == 202
