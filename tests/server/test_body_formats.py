"""What is legal in a body is accepted; what is not is refused for what it is."""

import asyncio
import base64
import codecs
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.requests import uploads
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_edits import IMAGE
from tests.server.test_errors import error_of

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = "application/json"
TEXT = json.dumps({"prompt": "für Müller", "seed": 1}, ensure_ascii=False)


async def post(client: httpx.AsyncClient, content: bytes, content_type: str = JSON, **headers: str) -> httpx.Response:
    url = EDITS if content_type.startswith("multipart") else GENERATIONS
    return await client.post(url, content=content, headers={"content-type": content_type, **headers})


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (codecs.BOM_UTF8 + TEXT.encode(), JSON),
        (TEXT.encode(), f"{JSON}; charset=utf-8"),
        (TEXT.encode(), f'{JSON};charset="UTF-8"'),
        (b'{"prompt": "x"}', f"{JSON}; charset=iso-8859-1"),  # ASCII in any case
    ],
)
async def test_json_that_is_read(
    client: httpx.AsyncClient, stub: StubEngine, content: bytes, content_type: str
) -> None:
    assert (await post(client, content, content_type)).status_code == 200
    assert stub.specs[0].prompt in ("x", "für Müller")


@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (TEXT.encode("latin-1"), JSON, "UTF-8; its byte 13 is not"),
        (TEXT.encode("utf-16"), JSON, "UTF-8, not in UTF-16"),
        (TEXT.encode("utf-16-be"), JSON, "UTF-8, not in UTF-16"),
        (TEXT.encode("utf-32"), JSON, "UTF-8, not in UTF-16 or UTF-32"),
        (TEXT.encode("utf-8"), f"{JSON}; charset=iso-8859-1", "UTF-8, not in iso-8859-1"),
        (b"", JSON, "is empty"),
        (b" \r\n\t", JSON, "is empty"),
        (codecs.BOM_UTF8, JSON, "is empty"),
        (b"[]", JSON, "must be a JSON object"),
        (b'{"prompt": }', JSON, "line 1, column 12"),
    ],
)
async def test_json_that_is_not(client: httpx.AsyncClient, content: bytes, content_type: str, message: str) -> None:
    response = await post(client, content, content_type)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize("content_type", [JSON, "multipart/form-data; boundary=B"])
async def test_a_compressed_body_is_refused_for_that(client: httpx.AsyncClient, content_type: str) -> None:
    refused = await post(client, b"\x1f\x8b", content_type, **{"content-encoding": "gzip"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "Content-Encoding")
    assert "uncompressed" in error_of(refused)["message"]


@pytest.mark.parametrize("field", ["n", "seed", "num_inference_steps", "width", "output_compression"])
async def test_an_integral_float_is_an_integer(client: httpx.AsyncClient, stub: StubEngine, field: str) -> None:
    fields = {"prompt": "x", "width": 64, "height": 64, field: 64.0 if field == "width" else 3.0}
    assert (await client.post(GENERATIONS, json=fields)).status_code == 200
    for wrong in (1.5, "3", True, -1e300):
        error = error_of(await client.post(GENERATIONS, json={**fields, field: wrong}))
        assert error["param"] == field
    plan = {"rows": 2.0, "cols": 2.0, "tokens": [1.0, 2, 3.0, 4]}
    response = await client.post(GENERATIONS, json={"prompt": "x", "size": "64x64", "plan": plan})
    assert response.status_code == 200
    assert stub.specs[-1].plan == {"rows": 2, "cols": 2, "tokens": [1, 2, 3, 4]}


@pytest.mark.parametrize("field", ["user", "style", "extra_headers"])
async def test_fields_without_effect_are_checked(client: httpx.AsyncClient, stub: StubEngine, field: str) -> None:
    right: Any = {"x-a": "b"} if field == "extra_headers" else "x"
    assert (await client.post(GENERATIONS, json={"prompt": "x", field: right})).status_code == 200
    for wrong in (5, ["x"], "x" if field == "extra_headers" else {"a": 1}):
        assert error_of(await client.post(GENERATIONS, json={"prompt": "x", field: wrong}))["param"] == field


async def test_the_fingerprint_covers_what_has_an_effect(client: httpx.AsyncClient, stub: StubEngine) -> None:
    async def send(**fields: Any) -> int:
        response = await client.post(
            GENERATIONS, json={"prompt": "x", "seed": 1, **fields}, headers={"idempotency-key": "once"}
        )
        return response.status_code

    assert [await send(), await send(user="me"), await send(n=1, size=None, extra_headers={"a": "b"})] == [200] * 3
    assert [await send(n=2), await send(negative_prompt="y"), await send(size="64x64")] == [422] * 3
    assert len(stub.specs) == 1


# --- forms ------------------------------------------------------------------------------------------------------------

BODY = (
    b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
    b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + IMAGE + b"\r\n--B--"
)
FORM = "multipart/form-data; boundary=B"


@pytest.mark.parametrize("preamble", [b"", b"\r\n", b"This is a message.\r\n", b"\r\n--\r\n--b\r\n", b"--A\r\n" * 99])
@pytest.mark.parametrize("epilogue", [b"", b"\r\n", b"\r\nThe end.\r\n--B\r\n"])
async def test_preambles_and_epilogues(
    client: httpx.AsyncClient, stub: StubEngine, preamble: bytes, epilogue: bytes
) -> None:
    assert (await post(client, preamble + BODY + epilogue, FORM)).status_code == 200
    assert stub.specs[0].prompt == "x"


async def test_blanks_behind_a_boundary(client: httpx.AsyncClient, stub: StubEngine) -> None:
    assert (await post(client, BODY.replace(b"--B\r\n", b"--B \t\r\n"), FORM)).status_code == 200
    refused = await post(client, BODY.replace(b"--B\r\n", b"--B" + b" " * 100 + b"\r\n"), FORM)
    assert "100 blanks" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b'form-data; name="prompt"; filename="' + b";" * 65 + b'"', "64 semicolons"),
        (b'form-data; name="prompt"' + b"".join(b"\r\nx%d: " % i + b"x" * 4000 for i in range(3)), "8192 bytes"),
        (b'form-data; name="prompt"\r\nContent-Transfer-Encoding: base64', "prompt: Content-Transfer-Encoding"),
    ],
)
async def test_headers_of_parts_are_bounded(client: httpx.AsyncClient, head: bytes, message: str) -> None:
    refused = await post(client, BODY.replace(b'form-data; name="prompt"', head), FORM)
    assert refused.status_code == 400
    assert message in error_of(refused)["message"]


@pytest.mark.parametrize("name", [b"prompt", b"plan", b"unknown", b"plan[tokens][]"])
async def test_text_is_bounded_as_it_arrives(client: httpx.AsyncClient, name: bytes) -> None:
    async def endless():
        yield BODY.replace(b'"prompt"\r\n\r\nx', b'"' + name + b'"\r\n\r\n').partition(b"\r\n--B\r\n")[0]
        for _ in range(256):
            yield b"x" * 2**17

    response = await client.post(EDITS, content=endless(), headers={"content-type": FORM})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["message"].endswith("it takes at most 1048576 bytes.")) == (name.decode(), True)


@pytest.mark.parametrize("limit", [100_000, 1000])
async def test_the_json_of_a_plan_has_the_limits_of_json(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("server.requests.body.MAX_VALUES", limit)
    plan = b'{"rows": 1, "cols": 1, "tokens": [' + b"1," * limit + b"1]}"
    async with make_client() as client:
        refused = await post(client, BODY.replace(b'"prompt"\r\n\r\nx', b'"plan"\r\n\r\n' + plan), FORM)
    assert (error_of(refused)["param"], f"more than {limit}" in error_of(refused)["message"]) == ("plan", True)


# --- base64 -----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=64), st.data(), st.integers(1, 20))
def test_base64_in_pieces(data: bytes, draw: st.DataObject, piece: int) -> None:
    """White space may be anywhere, padding may be missing; other characters are refused, as is more after padding."""
    encoded = base64.b64encode(data).decode()
    text = encoded.rstrip("=") if draw.draw(st.booleans()) else encoded
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(text)))
        text = text[:at] + draw.draw(st.sampled_from([" ", "\n", "\r\n", "\t"])) + text[at:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "_PIECE_CHARS", piece)
        assert asyncio.run(uploads._decode_base64("," + text, 1)) == data
        at = draw.draw(st.integers(0, len(text)))
        strange = text[:at] + draw.draw(st.sampled_from("*-_é,.\0")) + text[at:]
        for wrong in (strange, encoded + "=", "AA==" + text + "A"):
            with pytest.raises(ValueError, match=r"."):
                asyncio.run(uploads._decode_base64("," + wrong, 1))
