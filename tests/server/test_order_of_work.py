"""Nothing expensive happens for a request that is over a limit, and what has happened counts."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import QueueFull, QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Submitted
from server.app import create_app
from server.image_files.decoders import Decoders
from server.image_files.edit_input import EditInput
from server.image_files.images import prepare
from server.requests import prompt_rewriter
from server.services import Services
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.image_files import file_of, plain
from tests.server.stub_engine import StubEngine
from tests.server.test_decoders import ODD
from tests.server.test_edits import IMAGE, upload
from tests.server.test_errors import error_of
from tests.server.test_keys import bearer, table
from tests.server.test_rewriter import PROMPT, RICH, Endpoint, completion, serving
from tests.waiting import until

URL, EDITS = "/v1/images/generations", "/v1/images/edits"
PER_MINUTE = 4
DAY = 10 * 96 * 64 * 50


class Clumsy(JobQueue):
    """A queue whose submits fail as they are told, not in a dry run."""

    failure: Exception | None = None

    async def submit(self, *args: Any, dry_run: bool = False, **options: Any) -> Submitted:
        if self.failure is not None and not dry_run and options["max_queue"] > 0:
            raise self.failure
        return await super().submit(*args, dry_run=dry_run, **options)


@dataclasses.dataclass
class Api:
    """An API with a key of `PER_MINUTE` requests and `DAY` pixel-steps, which counts what its requests cost."""

    client: httpx.AsyncClient
    queue: Clumsy
    redis: redis.asyncio.Redis
    endpoint: Endpoint
    services: Services
    decodes: int = 0

    async def post(self, *images: bytes, key: str = "a", **fields: str) -> httpx.Response:
        data = {"prompt": PROMPT, "rewrite_prompt": "true", **fields}
        if not images:
            numbers = {name: int(value) for name, value in fields.items() if value.isdecimal()}
            json = {**data, **numbers, "rewrite_prompt": True}
            return await self.client.post(URL, json=json, headers=bearer(key))
        files = upload(*(("image", image) for image in images))
        return await self.client.post(EDITS, data=data, files=files, headers=bearer(key))

    async def used(self) -> tuple[int, int]:
        """Return the requests of the minute and the pixel-steps of the day."""
        (quota,) = await self.redis.keys("glimmer:quota:alice:*") or [b""]
        return await self.redis.zcard("glimmer:rate:alice"), int(await self.redis.get(quota) or 0)


@asynccontextmanager
async def opened_api(url: str, folder: Path, *, delay_s: float = 0.0, **options: Any) -> AsyncIterator[Api]:
    path = folder / "keys.toml"
    limits = {"requests_per_minute": PER_MINUTE, "pixel_steps_per_day": DAY, **options.pop("limits", {})}
    path.write_text(table("alice", "a", **limits) + table("bob", "b"))
    async with AsyncExitStack() as stack:
        redis_client = connect(url)
        stack.push_async_callback(redis_client.aclose)
        stack.push_async_callback(redis_client.flushdb)
        queue = Clumsy(redis_client)
        stack.push_async_callback(queue.close)
        if options.pop("with_engine", True):
            await stack.enter_async_context(StubEngine(queue))
        else:
            await queue.heartbeat(StubEngine(queue).info, "", 60)
        endpoint = await stack.enter_async_context(serving(Endpoint(completion(RICH), delay_s=delay_s)))
        app = create_app(ServerSettings(api_keys_file=path, prompt_rewriter=endpoint.url, **options), queue)
        await stack.enter_async_context(app.router.lifespan_context(app))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")
        api = Api(await stack.enter_async_context(client), queue, redis_client, endpoint, app.state.services)
        decoders: Any = api.services.decoders
        decode = decoders._decode

        async def counted(*args: Any) -> EditInput:
            api.decodes += 1
            return await decode(*args)

        decoders._decode = counted
        yield api


@pytest.fixture
async def api(redis_server: EmbeddedRedis, tmp_path: Path) -> AsyncIterator[Api]:
    async with opened_api(redis_server.url, tmp_path) as opened:
        yield opened


OUTCOMES = ["done", "edited", "full", "away", "bad image", "gone", "over quota", "too large", "bad plan", "attached"]


async def _play(api: Api, outcome: str) -> None:
    api.queue.failure = {"full": QueueFull("full"), "away": QueueUnavailable("away")}.get(outcome)
    if outcome in ("bad image", "edited", "full", "away"):
        await api.post(IMAGE[: len(IMAGE) // 2] if outcome == "bad image" else IMAGE, size="96x64")
    elif outcome == "gone":
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await api.post(IMAGE)
    elif outcome == "over quota":
        await api.post(size="2048x2048", n="10")
    elif outcome == "too large":
        await api.post(file_of(plain(1024, 1024)), num_inference_steps="200")
    elif outcome == "bad plan":
        await api.post(IMAGE, plan='{"rows": 9, "cols": 9, "tokens": [0]}')
    else:
        headers = {**bearer("a"), **({"idempotency-key": "once"} if outcome == "attached" else {})}
        await api.client.post(URL, json={"prompt": PROMPT}, headers=headers)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=6, max_size=14))
def test_work_happens_at_most_as_often_as_the_limit_allows(
    redis_server: EmbeddedRedis, tmp_path: Path, outcomes: list[str]
) -> None:
    async def play() -> None:
        async with opened_api(redis_server.url, tmp_path) as api:
            for outcome in outcomes:
                await _play(api, outcome)
                requests, _ = await api.used()
                assert api.decodes <= requests <= PER_MINUTE
                assert len(api.endpoint.requests) <= requests

    asyncio.run(play())


@pytest.mark.parametrize("failure", [QueueFull("full"), QueueUnavailable("away")])
async def test_a_job_that_is_refused_after_work_keeps_its_request_charged(api: Api, failure: Exception) -> None:
    api.queue.failure = failure
    for _ in range(20):
        assert (await api.post()).status_code in (429, 503)
    assert len(api.endpoint.requests) == PER_MINUTE
    await until(lambda: _is_refunded(api))
    api.queue.failure = None
    assert error_of(await api.post())["code"] == "rate_limit_exceeded"
    assert (await api.post(key="b")).status_code == 200


async def _is_refunded(api: Api) -> bool:
    return await api.used() == (PER_MINUTE, 0)


async def test_a_key_over_its_limit_costs_no_decoding(api: Api) -> None:
    for _ in range(PER_MINUTE):
        assert (await api.post(IMAGE[:60])).status_code == 400
    responses = [await api.post(IMAGE) for _ in range(10)]
    assert {response.status_code for response in responses} == {429}
    assert (api.decodes, await api.used()) == (PER_MINUTE, (PER_MINUTE, 0))


@pytest.mark.parametrize(
    ("limits", "options", "code"),
    [
        ({"max_concurrent": 1}, {}, "rate_limit_exceeded"),
        ({"pixel_steps_per_day": 64 * 64}, {}, "insufficient_quota"),
        ({}, {"max_queue": 1}, "rate_limit_exceeded"),
    ],
)
async def test_without_a_place_nothing_is_decoded_or_rewritten(
    redis_server: EmbeddedRedis, tmp_path: Path, limits: dict[str, int], options: dict[str, int], code: str
) -> None:
    async with opened_api(redis_server.url, tmp_path, with_engine=False, limits=limits, **options) as api:
        headers = {**bearer("b" if options else "a"), "prefer": "respond-async"}
        json = {"prompt": "x", "rewrite_prompt": False, "size": "64x64", "num_inference_steps": 1}
        assert (await api.client.post(URL, json=json, headers=headers)).status_code == 202
        for images in ((), (IMAGE,)):
            response = await api.post(*images, num_inference_steps="50")
            assert (response.status_code, error_of(response)["code"]) == (429, code)
        assert (api.decodes, api.endpoint.requests) == (0, [])
        assert (await api.used())[0] <= 1


async def test_an_edit_is_charged_for_the_size_of_its_image(api: Api) -> None:
    assert (await api.post(IMAGE, num_inference_steps="10")).status_code == 200
    assert await api.used() == (1, 10 * 96 * 64)
    refused = await api.post(file_of(plain(640, 640)), num_inference_steps="10")
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (429, "insufficient_quota")
    assert f"has used {10 * 96 * 64}; this request needs {10 * 640 * 640}" in error["message"]
    assert await api.used() == (2, 10 * 96 * 64)
    assert len(api.endpoint.requests) == 1


async def test_a_repetition_during_the_work_of_the_first_is_one_job(api: Api) -> None:
    headers = {**bearer("a"), "idempotency-key": "once"}
    posts = (api.client.post(URL, json={"prompt": PROMPT}, headers=headers) for _ in range(3))
    responses = await asyncio.gather(*posts)
    assert len({response.content for response in responses}) == 1
    assert len(api.endpoint.requests) <= (await api.used())[0]


@pytest.mark.parametrize("what", ["decode", "rewrite"])
async def test_work_ends_with_its_client(
    redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("server.services.Decoders", lambda: Decoders(ODD))
    async with opened_api(redis_server.url, tmp_path, delay_s=60.0) as api:
        task = asyncio.create_task(api.post(*((b"sleep",) if what == "decode" else ())))
        began: Callable[[], bool] = lambda: bool(api.decodes or api.endpoint.requests)
        await until(began)
        task.cancel()
        await asyncio.wait([task])
        assert await api.used() == (1, 0)
        assert (await api.queue.stats()).waiting == 0


async def test_calls_of_the_rewriter_at_once_are_bounded(
    redis_server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_rewriter, "CALLS", 3)
    monkeypatch.setattr(prompt_rewriter, "CALLS_PER_CALLER", 2)
    async with opened_api(redis_server.url, tmp_path, delay_s=60.0) as api:
        tasks = [asyncio.create_task(api.post()) for _ in range(PER_MINUTE)]
        await until(lambda: len(api.endpoint.requests) == 2)
        tasks.append(asyncio.create_task(api.post(key="b")))
        await until(lambda: len(api.endpoint.requests) == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert await api.used() == (2, 0)  # two never had their turn


async def test_decoded_images_count_as_memory_until_they_are_submitted(
    redis_server: EmbeddedRedis, tmp_path: Path
) -> None:
    jpeg = file_of(plain(512, 512), "JPEG")
    decoded = prepare([jpeg], None, None, 2048 * 2048).source_images.size
    async with opened_api(redis_server.url, tmp_path, delay_s=60.0) as api:
        task = asyncio.create_task(api.post(jpeg, num_inference_steps="1"))
        await until(lambda: api.endpoint.requests)
        assert api.services.memory.in_use == decoded
        task.cancel()
        await asyncio.wait([task])
        assert api.services.memory.in_use == 0
