"""Every legal way to write a request, as JSON or as a form, gives the same request."""

import asyncio
import base64
import codecs
import json
from typing import Any
from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st

from server.requests.uploads import read_edit
from tests.server.incoming import read_body

CHARSETS = ["utf-8", "iso-8859-1", "windows-1252", "gb18030"]
PLAN = {"rows": 2, "cols": 2, "tokens": [3, 0, 2, 1]}
FIELDS = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(codec="latin-1"), min_size=1, max_size=20)},
    optional={
        "n": st.integers(1, 10),
        "seed": st.integers(-1, 2**53 - 1),
        "guidance_scale": st.sampled_from([0.0, 1.5, 20.0]),
        "embed_prompt": st.booleans(),
        "quotes": st.sampled_from(["reference", "strict"]),
        "plan": st.just(PLAN),
    },
)
FILES = st.lists(st.binary(max_size=30).filter(lambda data: not data.startswith((b"data:", b"http"))), min_size=1)


def _encodable(text: str, charset: str) -> str:
    try:
        text.encode(charset)
    except UnicodeEncodeError:
        return "utf-8"
    return charset


@st.composite
def as_json(draw: st.DrawFn, fields: dict[str, Any], files: list[bytes]) -> tuple[bytes, str]:
    def spelled(value: Any) -> Any:
        if type(value) is int and draw(st.booleans()):
            return float(value)
        if isinstance(value, dict):
            return {name: spelled(inner) for name, inner in value.items()}
        return [spelled(inner) for inner in value] if isinstance(value, list) else value

    def url(data: bytes) -> Any:
        encoded = base64.b64encode(data).decode()
        spellings = [
            f"data:;base64,{encoded}",
            f"data:image/png;base64,{encoded.rstrip('=')}\n",
            f"data:,{quote(data)}",
        ]
        text = draw(st.sampled_from([*spellings, f"DATA:a/b;BASE64,{quote(encoded, safe='')}"]))
        return draw(st.sampled_from([text, {"image_url": text}]))

    urls = [url(data) for data in files]
    images: dict[str, Any] = {draw(st.sampled_from(["image", "images"])): urls}
    if len(urls) == 1 and draw(st.booleans()):
        images = {"image": urls[0]}
    nothing = draw(st.sampled_from([{}, {"size": None}, {"user": "x", "mask": None}]))
    document = {name: spelled(value) for name, value in fields.items()} | images | nothing
    items = dict(draw(st.permutations(list(document.items()))))
    text = json.dumps(items, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1, "\t"])))
    charset = _encodable(text, draw(st.sampled_from(CHARSETS)))
    if charset == "utf-8":
        mark = draw(st.sampled_from([b"", codecs.BOM_UTF8]))
        return mark + text.encode(), draw(st.sampled_from(["application/json", 'Application/JSON;charset="UTF-8"']))
    return text.encode(charset), f"application/json; charset={charset}"


@st.composite
def as_form(draw: st.DrawFn, fields: dict[str, Any], files: list[bytes]) -> tuple[bytes, str]:
    parts: list[tuple[str, bytes]] = []
    charset = _encodable(fields["prompt"], draw(st.sampled_from(CHARSETS)))
    where = draw(st.sampled_from(["part", "form", "field"]))

    def add(name: str, text: str) -> None:
        kind = f"\r\nContent-Type: text/plain; charset={charset}" if where == "part" else ""
        parts.append((f'form-data; name="{name}"{kind}', text.encode(charset)))

    for name, value in fields.items():
        if name != "plan":
            text = str(value) if draw(st.booleans()) else json.dumps(value)
            add(name, value if isinstance(value, str) else text)
        elif draw(st.booleans()):
            add(name, json.dumps(value))
        else:
            for side in ("rows", "cols"):
                add(f"plan[{side}]", str(value[side]))
            indexed = draw(st.booleans())
            for index, token in enumerate(value["tokens"]):
                add(f"plan[tokens][{index if indexed else ''}]", str(token))
    name = draw(st.sampled_from(["image", "image[]", "image[{}]"]))
    shown = [(f'form-data; name="{name.format(index)}"; filename="a"', data) for index, data in enumerate(files)]
    parts += draw(st.permutations(shown)) if "{}" in name else shown
    if where == "field":
        parts.append(('form-data; name="_charset_"', charset.encode()))
    body = draw(st.sampled_from([b"", b"Preamble\r\n"]))
    for head, data in parts:
        body += b"--BoUnDaRy\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + data + b"\r\n"
    body += b"--BoUnDaRy--" + draw(st.sampled_from([b"", b"\r\nEpilogue"]))
    return body, "multipart/form-data; boundary=BoUnDaRy" + (f"; charset={charset}" if where == "form" else "")


@settings(max_examples=150, deadline=None)
@given(fields=FIELDS, files=FILES.map(lambda files: files[:4]), data=st.data(), chunk=st.integers(1, 400))
def test_all_spellings_mean_the_same(
    fields: dict[str, Any], files: list[bytes], data: st.DataObject, chunk: int
) -> None:
    for spelling in (as_json, as_form):
        content, content_type = data.draw(spelling(fields, files))
        parsed = asyncio.run(read_body(read_edit, content, content_type, chunk, 2**20))
        assert parsed.images == files
        assert parsed.request.model_dump(include=set(fields)) == {
            name: {**value, "preview": None} if name == "plan" else value for name, value in fields.items()
        }
