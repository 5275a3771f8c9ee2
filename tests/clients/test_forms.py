"""Forms as .NET and Go write them, with a length and in chunks."""

import base64
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.clients.forms import DOTNET, GO, Library, form
from tests.clients.test_openai import MASK
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE

FILENAMES = ["in.png", "a photo (1).png", "C:\\Users\\x\\a;b.png", "猫 🐈.png", "50%'s*.png", "anonymous_file"]
ONLY_GO = ['we"ird.png', ""]  # .NET refuses to send them
FIELDS = {"prompt": 'größer\r\n--7 "緑"', "n": "1", "seed": "4", "size": "160x96", "output_format": "png"}


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


@pytest.mark.parametrize("library", [DOTNET, GO], ids=["dotnet", "go"])
async def test_forms(live_server: LiveServer, stub: StubEngine, library: Library) -> None:
    names = FILENAMES + (ONLY_GO if library is GO else [])
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        for count, filename in enumerate(names, 1):
            content_type, body = form(
                library, FIELDS, ("image[]", filename, IMAGE), ("image[]", "b.png", IMAGE), ("mask", filename, MASK)
            )
            for content in (body, chunks(body)):
                headers = {"content-type": content_type}
                response = await client.post("/v1/images/edits", content=content, headers=headers)
                assert response.status_code == 200, (filename, response.text)
                spec, sources = stub.specs[-1], stub.sources[-1]
                assert (spec.prompt, spec.num_sources, spec.seed, spec.width) == (FIELDS["prompt"], 2, 4, 160)
                assert base64.b64decode(response.json()["data"][0]["b64_json"]) == stub_image(spec, 4, sources)
            assert len(stub.specs) == 2 * count
