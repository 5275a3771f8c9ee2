"""Cross-origin requests: off by default, by list, and with all headers that scripts need, errors included."""

import httpx
import pytest
from pydantic import ValidationError

from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of

URL = "/v1/images/generations"
PAGE = "https://app.example.org"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_off_by_default(client: httpx.AsyncClient, stub: StubEngine) -> None:
    responses = (
        await client.options(URL, headers=PREFLIGHT),
        await client.post(URL, json={"prompt": "x"}, headers={"origin": PAGE}),
    )
    assert [response.status_code for response in responses] == [405, 403]
    assert not any(name.startswith("access-control") for response in responses for name in response.headers)


@pytest.mark.parametrize("origins", [f"http://localhost:3000, {PAGE}", "*"])
async def test_listed_origins(make_client: MakeClient, stub: StubEngine, origins: str) -> None:
    async with make_client(cors_origins=origins, api_key="k") as client:
        preflight = await client.options(URL, headers=PREFLIGHT)
        posted = await client.post(URL, json={"prompt": "x"}, headers={"origin": PAGE, "authorization": "Bearer k"})
        stranger = await client.get(
            "/v1/models", headers={"origin": "https://evil.example", "authorization": "Bearer k"}
        )
    assert preflight.status_code == 200
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert posted.status_code == 200
    exposed = {name.strip() for name in posted.headers["access-control-expose-headers"].split(",")}
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-requests"} <= exposed
    for response in (preflight, posted):
        assert response.headers["access-control-allow-origin"] == ("*" if origins == "*" else PAGE)
    assert ("access-control-allow-origin" in stranger.headers) == (origins == "*")


async def test_errors_are_readable_too(
    make_client: MakeClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(queue, "submit", broken)
    async with make_client(cors_origins=PAGE, api_key="k") as client:
        client.headers = httpx.Headers({"origin": PAGE, "authorization": "Bearer k"})
        responses = (
            await client.post(URL, json={"prompt": "x"}, headers={"authorization": "Bearer no"}),
            await client.get("/nothing/here"),
            await client.post(URL, json={"prompt": ""}),
            await client.post(URL, json={"prompt": "x"}),
        )
    assert [response.status_code for response in responses] == [401, 404, 400, 500]
    for response in responses:
        assert error_of(response)
        assert response.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origins", ["example.org", "https://example.org/", "https://a.org,ftp://b.org", "https://"])
def test_invalid_origins_are_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin; write it like"):
        ServerSettings(cors_origins=origins)
