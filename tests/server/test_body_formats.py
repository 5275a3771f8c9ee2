"""What is legal in a body is accepted; what is not is refused for what it is."""

import asyncio
import base64
import codecs
import io
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.requests import uploads
from tests.server.conftest import MakeClient
from tests.server.image_files import file_of, plain
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
        (b'{"prompt": "x"}', f"{JSON}; charset=us-ascii"),
        *((TEXT.encode(name), f"{JSON}; charset={name}") for name in ("iso-8859-1", "windows-1252", "gb18030")),
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
        (b'{"prompt": "\x81"}', f"{JSON}; charset=windows-1252", "is not valid windows-1252, which its"),
        *(
            (b'{"prompt": "x"}', f"{JSON}; charset={name}", f"is in {name}")
            for name in ("utf-7", "utf-16", "cp037", "idna")
        ),
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
@pytest.mark.parametrize(
    ("header", "value"),
    [("Content-Encoding", "gzip"), ("Content-Encoding", "identity, br"), ("Transfer-Encoding", "gzip, chunked")],
)
async def test_a_compressed_body_is_refused_for_that(
    client: httpx.AsyncClient, content_type: str, header: str, value: str
) -> None:
    refused = await post(client, b"\x1f\x8b", content_type, **{header: value})
    assert (refused.status_code, error_of(refused)["param"]) == (400, header)
    assert "uncompressed" in error_of(refused)["message"]


async def test_codings_that_change_nothing(client: httpx.AsyncClient, stub: StubEngine) -> None:
    for headers in ({"content-encoding": ""}, {"content-encoding": "Identity"}, {"transfer-encoding": "Chunked"}):
        assert (await post(client, b'{"prompt": "x"}', **headers)).status_code == 200


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
PROMPT_HEAD = b'Content-Disposition: form-data; name="prompt"'


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


@pytest.mark.parametrize("name", ["utf-8", "iso-8859-1", "windows-1252", "gb18030"])
@pytest.mark.parametrize("where", ["part", "form", "field"])
async def test_the_encoding_of_text_in_a_form(
    client: httpx.AsyncClient, stub: StubEngine, name: str, where: str
) -> None:
    text = b'"prompt"' + (f"\r\nContent-Type: text/plain; charset={name}" if where == "part" else "").encode()
    body = BODY.replace(b'"prompt"\r\n\r\nx', text + b"\r\n\r\n" + "für".encode(name))
    if where == "field":
        field = f'--B\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\n{name}\r\n--B--'
        body = body.replace(b"--B--", field.encode())
    assert (await post(client, body, f"{FORM}; charset={name}" if where == "form" else FORM)).status_code == 200
    assert stub.specs[0].prompt == "für"


@pytest.mark.parametrize(
    ("header", "param", "message"),
    [
        ("Content-Type: text/plain; charset=utf-7", "prompt", "prompt is in utf-7"),
        ("Content-Type: text/plain; charset=utf-16", "prompt", "prompt is in utf-16"),
        ("Content-Encoding: gzip", "Content-Encoding", "uncompressed"),
    ],
)
async def test_parts_that_are_not_read(client: httpx.AsyncClient, header: str, param: str, message: str) -> None:
    refused = await post(client, BODY.replace(b'"prompt"', f'"prompt"\r\n{header}'.encode()), FORM)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
    assert message in error_of(refused)["message"]


async def test_an_empty_form_is_refused_for_that(client: httpx.AsyncClient) -> None:
    assert "it is empty" in error_of(await post(client, b"", FORM))["message"]


async def test_indexed_names(client: httpx.AsyncClient, stub: StubEngine) -> None:
    """As PHP, Rails and some JavaScript libraries write lists."""
    wide, high = file_of(plain(128, 64)), file_of(plain(64, 128))
    fields: dict[str, Any] = {"prompt": "x", "size": "64x64", "plan[rows]": "2", "plan[cols]": "2"}
    tokens = {f"plan[tokens][{index}]": str(index) for index in range(4)}
    files = [("image[1]", ("a", high)), ("image[0]", ("b", wide))]
    assert (await client.post(EDITS, data=fields | tokens, files=files)).status_code == 200
    assert stub.specs[0].plan == {"rows": 2, "cols": 2, "tokens": [0, 1, 2, 3]}
    [sources] = stub.sources
    assert sources is not None
    assert [Image.open(io.BytesIO(data)).size for data in sources.files] == [(128, 64), (64, 128)]
    refused = await client.post(EDITS, data=fields | {"plan[tokens][1]": "1"}, files=files)
    assert "plan[tokens][1] is out of order: token 0" in error_of(refused)["message"]
    for name in ("image[x]", "image[", "image[0][0]", "images[0]", "prompt[0]", "mask[12345]"):
        refused = await client.post(EDITS, data={"prompt": "x", name: "x"}, files=[("image", ("a", wide))])
        assert error_of(refused)["code"] == "unknown_parameter", name


@pytest.mark.parametrize(("text", "value"), [("True", True), ("FALSE", False), ("false", False)])
async def test_booleans_of_a_form(client: httpx.AsyncClient, stub: StubEngine, text: str, value: bool) -> None:
    body = BODY.replace(b'"prompt"', b'"embed_prompt"\r\n\r\n%b\r\n--B\r\n' % text.encode() + PROMPT_HEAD, 1)
    assert (await post(client, body, FORM)).status_code == 200
    assert stub.specs[0].embed_prompt == value


# --- base64 -----------------------------------------------------------------------------------------------------------


async def decode(text: str) -> bytes:
    return await uploads._decode_base64(uploads._pieces("," + text, 1))


@given(st.binary(max_size=64), st.data(), st.integers(1, 20))
def test_base64_in_pieces(data: bytes, draw: st.DataObject, piece: int) -> None:
    """White space may be anywhere, padding may be missing, any byte may be escaped; other characters are refused, as is
    more after padding."""
    encoded = base64.b64encode(data).decode()
    text = encoded.rstrip("=") if draw.draw(st.booleans()) else encoded
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(text)))
        text = text[:at] + draw.draw(st.sampled_from([" ", "\n", "\r\n", "\t"])) + text[at:]
    escapes = draw.draw(st.lists(st.sampled_from(["", "%%%02x", "%%%02X"]), min_size=len(text), max_size=len(text)))
    escaped = "".join(how % ord(char) if how else char for char, how in zip(text, escapes, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "_PIECE_CHARS", piece)
        patch.setattr(uploads, "_ESCAPED_PIECE_CHARS", piece)
        assert asyncio.run(decode(text)) == asyncio.run(decode(escaped)) == data
        at = draw.draw(st.integers(0, len(text)))
        strange = text[:at] + draw.draw(st.sampled_from("*-_é,.\0")) + text[at:]
        for wrong in (strange, encoded + "=", "AA==" + text + "A"):
            with pytest.raises(ValueError, match=r"."):
                asyncio.run(decode(wrong))


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + quote(base64.b64encode(IMAGE)),
        "data:;BASE64," + base64.b64encode(IMAGE).decode(),
        "data:image/png; base64," + base64.b64encode(IMAGE).decode(),
        "data:image/png;name=a.png;base64," + base64.b64encode(IMAGE).decode(),
        "data:image/png," + quote(IMAGE),
        "DATA:," + quote(IMAGE, safe=""),
    ],
)
async def test_data_urls(client: httpx.AsyncClient, stub: StubEngine, url: str) -> None:
    assert (await client.post(EDITS, json={"prompt": "x", "image": url})).status_code == 200
