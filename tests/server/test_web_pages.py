"""What a web page can make a browser send to a server without keys."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.admission.web_pages import WebPageGuard
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of

URL = "/v1/images/generations"
LOCAL = [
    "127.0.0.1:8000", "[::1]:8000", "192.0.2.7", "localhost:8000", "app.localhost", "gpu1", "t", "gpu1.local",
    "LOCALHOST.", "host.docker.internal:8000", "glimmer.ns.svc.cluster.local", "glimmer.ns.svc", "[fe80::1%eth0]", "",
]  # fmt: skip
CLAIMABLE = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost.com",
    "xlocal.org", "evil.local.example", "images.example.org", "a b", "[evil.example]", "evil.example@localhost",
    "localhost:8000@evil.example",
]  # fmt: skip


def body(content_type: str | None = "application/json", **headers: str) -> dict[str, object]:
    types = {} if content_type is None else {"content-type": content_type}
    return {"content": b'{"prompt": "x"}', "headers": {**types, **{k.replace("_", "-"): v for k, v in headers.items()}}}


@pytest.mark.parametrize("host", LOCAL)
async def test_names_that_no_page_can_claim(client: httpx.AsyncClient, host: str) -> None:
    for path in ("/", "/v1/models", "/live"):
        assert (await client.get(path, headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", CLAIMABLE)
async def test_a_name_that_a_page_could_have_pointed_here(client: httpx.AsyncClient, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("POST", URL)):
        refused = await client.request(method, path, headers={"host": host})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "host_not_allowed")
        assert "GLIMMER_ALLOWED_HOSTS" in error_of(refused)["message"]
    assert (await client.get("/live", headers={"host": host})).status_code == 200


@given(label=st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True), under=st.sampled_from(["com", "org", "dev", "co.uk"]))
def test_no_public_name_is_accepted(label: str, under: str) -> None:
    guard = WebPageGuard(_no_app, ServerSettings(), Metrics())
    assert not guard._is_known(f"{label}.{under}:8000")
    assert not guard._is_known(f"localhost.{label}.{under}.")


async def _no_app(*_: object) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("settings", "hosts"),
    [
        ({"allowed_hosts": "images.example.org, b.example"}, ["images.example.org:80", "B.example"]),
        ({"allowed_hosts": "*.example.org"}, ["images.example.org", "a.b.example.org"]),
        ({"allowed_hosts": "*"}, ["evil.example"]),
        ({"public_url": "https://images.example.org/glimmer"}, ["images.example.org"]),
        ({"host": "gpu.example.org"}, ["gpu.example.org:8000"]),
        ({"api_key": "k"}, ["evil.example"]),  # a page has no key
    ],
)
async def test_allowed_names(make_client: MakeClient, settings: dict[str, str], hosts: list[str]) -> None:
    async with make_client(**settings) as client:
        for host in hosts:
            headers = {"host": host, "authorization": "Bearer k"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        if settings.get("allowed_hosts") == "*.example.org":
            assert (await client.get("/", headers={"host": "example.org.evil.example"})).status_code == 403


@pytest.mark.parametrize("name", ["https://a.org", "a.org:80", "a b", "*a.org", "a.*.org"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a host name; write it like"):
        ServerSettings(allowed_hosts=name)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", None])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://t:8001"},
        {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "cross-site", "origin": "http://t"},
    ],
)
async def test_requests_of_pages_elsewhere_are_refused(
    client: httpx.AsyncClient, stub: StubEngine, headers: dict[str, str], content_type: str | None
) -> None:
    options = body(content_type, **headers)
    refused = await client.post(URL, **options)  # type: ignore[arg-type]
    assert (refused.status_code, error_of(refused)["code"]) == (403, "origin_not_allowed")
    assert "GLIMMER_CORS_ORIGINS" in error_of(refused)["message"]
    for method, path in (("GET", "/v1/models"), ("DELETE", "/v1/jobs/x"), ("GET", "/v1/jobs/x/events")):
        assert (await client.request(method, path, headers=options["headers"])).status_code == 403  # type: ignore[arg-type]
    assert stub.specs == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://t"},
        {"origin": "https://t"},  # behind a proxy that ends TLS
        {"origin": "http://t", "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
    ],
)
async def test_the_playground_and_other_clients_are_served(
    client: httpx.AsyncClient, stub: StubEngine, headers: dict[str, str]
) -> None:
    for content_type in ("application/json", None):
        options = body(content_type, **headers)
        assert (await client.post(URL, **options)).status_code == 200  # type: ignore[arg-type]


async def test_links_and_images_in_pages_elsewhere_work(client: httpx.AsyncClient, stub: StubEngine) -> None:
    created = await client.post(URL, json={"prompt": "x", "response_format": "url"})
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await client.get(created.json()["data"][0]["url"], headers=elsewhere)).status_code == 200
    assert (await client.get("/", headers=elsewhere)).status_code == 200


@pytest.mark.parametrize("origins", ["https://app.example.org", "*"])
async def test_allowed_origins_are_served(make_client: MakeClient, stub: StubEngine, origins: str) -> None:
    page = {"origin": "https://app.example.org", "sec-fetch-site": "cross-site"}
    async with make_client(cors_origins=origins) as client:
        asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        assert (await client.options(URL, headers=asked)).status_code == 200
        assert (await client.post(URL, json={"prompt": "x"}, headers=page)).status_code == 200
        other = await client.post(URL, json={"prompt": "x"}, headers={"origin": "https://evil.example"})
        assert other.status_code == (200 if origins == "*" else 403)


async def test_refusals_are_counted(client: httpx.AsyncClient) -> None:
    await client.get("/", headers={"host": "evil.example"})
    await client.get("/v1/models", headers={"origin": "null"})
    text = (await client.get("/metrics")).text
    for reason in ("host", "cross_site"):
        assert f'glimmer_http_refused_total{{reason="{reason}"}} 1.0' in text
