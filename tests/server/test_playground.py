"""The files of the playground and of the API reference as they are served. `tests.browser` tests them in a browser."""

import asyncio
import importlib.metadata
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.requests.schemas import EditRequest
from server.routes.pages import FOLDER, PIECE_BYTES, SWAGGER_UI
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer, MakeClient
from tests.waiting import until

PAGES = {"/": "index.html", "/docs": "docs.html"}
PARTS = sorted(path.name for path in FOLDER.iterdir() if path.name not in PAGES.values())
ADDRESSES = [*PAGES, *(f"/playground/{name}" for name in (*PARTS, *SWAGGER_UI))]
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SVG_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # a name that is never loaded


class Elements(HTMLParser):
    """Collects every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def content(name: str) -> bytes:
    if name not in SWAGGER_UI:
        return (FOLDER / name).read_bytes()
    package = importlib.metadata.distribution("fastapi-swagger")
    return Path(str(package.locate_file(f"fastapi_swagger/resources/{name}"))).read_bytes()


def elements(name: str) -> list[tuple[str, dict[str, str | None]]]:
    return Elements((FOLDER / name).read_text()).found


@pytest.mark.parametrize("address", ADDRESSES)
async def test_files(client: httpx.AsyncClient, address: str) -> None:
    response = await client.get(address)
    name = PAGES.get(address) or address.rpartition("/")[2]
    assert (response.status_code, response.content) == (200, content(name))
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["content-type"].startswith(KINDS[name.rpartition(".")[2]])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == ("'self' blob: data:" if address == "/docs" else "'self' blob:")
    assert policy.get("require-trusted-types-for") == (None if address == "/docs" else "'script'")
    assert set(" ".join(policy.values()).split()) <= {"'none'", "'self'", "blob:", "data:", "'script'"}
    unchanged = await client.get(address, headers={"if-none-match": response.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["content-security-policy"] == response.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapp.py", "%2e%2e%2fapp.py", "index.htm", "__init__.py"])
async def test_other_files_are_not_served(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/playground/{name}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_a_large_file_that_is_not_read_costs_little(live_server: LiveServer) -> None:
    name = max(SWAGGER_UI, key=lambda name: len(content(name)))
    reader, writer = await asyncio.open_connection(*live_server.address)
    writer.write(f"GET /playground/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def unsent() -> int:
        return sum(connection.unsent_bytes for connection in live_server.server.server_state.connections)  # type: ignore[union-attr]

    await until(lambda: unsent() > 0)
    assert unsent() < 3 * PIECE_BYTES < len(content(name))
    writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert content(name) in await reader.read()
    writer.close()


async def test_the_pages_need_no_key(make_client: MakeClient) -> None:
    async with make_client(api_key="right") as client:
        for address in ADDRESSES:
            assert (await client.get(address)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_the_openapi_document_does_not_list_them(client: httpx.AsyncClient) -> None:
    assert not {*ADDRESSES, "/playground/{name}"} & set((await client.get("/openapi.json")).json()["paths"])


async def test_the_openapi_document_is_made_once(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    app, made = create_app(ServerSettings(), queue), []
    make = app.openapi
    monkeypatch.setattr(app, "openapi", lambda: made.append(1) or make())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        first, second = await client.get("/openapi.json"), await client.get("/openapi.json")
        assert (first.json(), second.content, len(made)) == (make(), first.content, 1)
        unchanged = await client.get("/openapi.json", headers={"if-none-match": first.headers["etag"]})
        assert (unchanged.status_code, unchanged.content) == (304, b"")


@pytest.mark.parametrize("name", [*PAGES.values(), *PARTS])
def test_nothing_is_loaded_from_other_servers(name: str) -> None:
    text = (FOLDER / name).read_text().replace(SVG_NAMESPACE, "")
    assert not re.findall(r"""https?:|data:\w+/|@import|["'(]//""", text)


@pytest.mark.parametrize("name", PAGES.values())
async def test_references_of_a_page_exist(client: httpx.AsyncClient, name: str) -> None:
    """References are relative to the page, so that a proxy may serve all of it in a folder."""
    used = {attributes.get("src") or attributes.get("href") or "" for _, attributes in elements(name)} - {""}
    assert used
    for address in used:
        assert not address.startswith("/")
        assert (await client.get(f"/{address.removeprefix('.')}")).status_code == 200


def test_every_file_is_used() -> None:
    in_pages = "".join((FOLDER / name).read_text() for name in PAGES.values())
    imported = {name for part in PARTS for name in re.findall(r'from "\./(.*?)"', (FOLDER / part).read_text())}
    every = {*PARTS, *SWAGGER_UI}
    assert {part for part in every if f'"playground/{part}"' in in_pages} | imported == every


@pytest.mark.parametrize("name", PAGES.values())
def test_a_page_obeys_its_policy(name: str) -> None:
    """No inline scripts or styles: the policy would block them, visibly only in a browser."""
    for tag, attributes in elements(name):
        assert tag not in ("style", "base", "iframe", "object")
        assert tag != "script" or attributes["src"]
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_every_control_is_a_field_of_the_api_and_has_a_label() -> None:
    page = elements("index.html")
    labelled = {attributes["for"] for tag, attributes in page if tag == "label"}
    controls = [attributes for tag, attributes in page if tag in ("input", "select", "textarea")]
    assert len(controls) >= 12
    for control in controls:
        assert control["id"] in labelled
        # The page finds the field of an error by its id.
        assert control.get("name", control["id"]) == control["id"]
        assert control["id"] in {*EditRequest.model_fields, "key"}
