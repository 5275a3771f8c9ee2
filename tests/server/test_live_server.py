"""The API behind a real socket: clients that leave, the official SDK, and a drain by signal."""

import asyncio
import base64
import os
import signal

import httpx
import openai
import pytest
import redis.asyncio

from engine.jobs.job import JobError, JobRecord
from engine.jobs.queue import JobQueue
from server.settings import ServerSettings
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, picture
from tests.server.test_admission import until

URL = "/v1/images/generations"


def sdk(server: LiveServer, **options: object) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, **options)  # type: ignore[arg-type]


async def test_a_client_that_leaves_takes_its_job_along(live_server: LiveServer, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=10, slots=1), httpx.AsyncClient(base_url=live_server.url) as client:
        posts = [asyncio.create_task(client.post(URL, json={"prompt": "x"}, timeout=60)) for _ in range(3)]
        await until(lambda: _stats_are(queue, waiting=2, running=1))
        for post in posts:
            post.cancel()
        await asyncio.wait(posts)
        await until(lambda: _stats_are(queue, waiting=0, running=0), seconds=1.0)
        metrics = (await client.get("/metrics")).text
    assert 'glimmer_api_jobs_total{state="cancelled"} 3.0' in metrics
    assert 'route="/v1/images/generations",status="499"} 3.0' in metrics


async def test_a_delivered_picture_does_not_stay_in_redis(
    live_server: LiveServer, stub: StubEngine, redis_client: redis.asyncio.Redis
) -> None:
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
    (key,) = await redis_client.keys("glimmer:result:*")

    async def goes_soon() -> bool:
        return await redis_client.pttl(key) <= 5000

    await until(goes_soon)


async def test_a_picture_whose_client_left_does_not_stay_in_redis(
    live_server: LiveServer, queue: JobQueue, redis_client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends before its client's leaving is seen."""

    wait = queue.wait

    async def slow(job_id: str) -> JobRecord:
        await asyncio.sleep(60)
        return await wait(job_id)

    async def results() -> int:
        return len(await redis_client.keys("glimmer:result:*"))

    async def no_results() -> bool:
        return await results() == 0

    monkeypatch.setattr(queue, "wait", slow)
    async with StubEngine(queue), httpx.AsyncClient(base_url=live_server.url) as client:
        posted = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(results)
        posted.cancel()
        await asyncio.wait([posted])
        await until(no_results)


async def _stats_are(queue: JobQueue, waiting: int, running: int) -> bool:
    stats = await queue.stats()
    return (stats.waiting, stats.running) == (waiting, running)


async def test_a_client_that_leaves_in_the_middle_of_its_body(live_server: LiveServer, queue: JobQueue) -> None:
    host, port = live_server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        await until(lambda: _counts_a_departure(client))


async def _counts_a_departure(client: httpx.AsyncClient) -> bool:
    return 'status="499"} 1.0' in (await client.get("/metrics")).text


class TestOpenAiSdk:
    async def test_generate(self, live_server: LiveServer, stub: StubEngine) -> None:
        async with sdk(live_server) as client:
            answer = await client.images.generate(
                prompt="a fox", n=2, size="1024x1024", quality="low", extra_body={"seed": 4, "num_inference_steps": 3}
            )
        assert answer.data is not None
        assert answer.usage is not None
        assert [base64.b64decode(image.b64_json or "") for image in answer.data] == [
            picture(stub.specs[0], seed) for seed in (4, 5)
        ]
        assert answer.usage.input_tokens_details.text_tokens == 2
        assert stub.specs[0].num_inference_steps == 3

    async def test_nulls(self, live_server: LiveServer, stub: StubEngine) -> None:
        async with sdk(live_server) as client:
            answer = await client.images.generate(prompt="a fox", n=None, size=None, quality="auto", background=None)
        assert answer.data is not None
        assert len(answer.data) == 1

    async def test_models(self, live_server: LiveServer) -> None:
        async with sdk(live_server) as client:
            assert [model.id async for model in client.models.list()] == ["glm-image", "zai-org/GLM-Image"]
            assert (await client.models.retrieve("zai-org/GLM-Image")).owned_by == "glimmer"
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.retrieve("other")
        assert caught.value.code == "model_not_found"

    @pytest.mark.parametrize(
        ("fields", "kind", "param", "code"),
        [
            ({"n": 11}, openai.BadRequestError, "n", "invalid_value"),
            ({"extra_body": {"num_step": 1}}, openai.BadRequestError, "num_step", "unknown_parameter"),
            ({"model": "dall-e-2"}, openai.NotFoundError, "model", "model_not_found"),
            ({"prompt": "refused"}, openai.BadRequestError, "prompt", "invalid_value"),
            ({"prompt": "broken"}, openai.InternalServerError, None, "internal_error"),
            ({"extra_body": {"timeout": 0.05}}, openai.InternalServerError, None, "deadline_exceeded"),
        ],
    )
    async def test_errors(
        self, live_server: LiveServer, queue: JobQueue, fields: dict, kind: type, param: str | None, code: str
    ) -> None:
        async with StubEngine(queue, step_s=0.01) as stub, sdk(live_server) as client:
            stub.failures = {
                "refused": JobError("No.", "invalid_request_error", "invalid_value", "prompt"),
                "broken": JobError("Broken.", "server_error", "internal_error"),
            }
            with pytest.raises(kind) as caught:
                await client.images.generate(**{"prompt": "x", **fields})
        error = caught.value
        assert isinstance(error, openai.APIStatusError)
        assert (error.param, error.code) == (param, code)
        assert error.request_id == error.response.headers["x-request-id"]

    async def test_no_engine(self, live_server: LiveServer) -> None:
        async with sdk(live_server) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.images.generate(prompt="x")
        assert (caught.value.status_code, caught.value.type) == (503, "server_error")

    async def test_wrong_key_and_full_queue(self, queue: JobQueue) -> None:
        server = LiveServer(queue, ServerSettings(api_key="right", max_queue=0))  # type: ignore[arg-type]
        async with StubEngine(queue), sdk(server) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.images.generate(prompt="x")
            with pytest.raises(openai.RateLimitError) as full:
                await client.with_options(api_key="right").images.generate(prompt="x")
        await server.stop()
        assert refused.value.code == "invalid_api_key"
        assert full.value.code == "rate_limit_exceeded"


async def test_sigterm_finishes_what_runs(queue: JobQueue) -> None:
    server = LiveServer(queue, ServerSettings(grace_s=10))
    async with StubEngine(queue, step_s=0.5), httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x", "num_inference_steps": 1}))
        await until(lambda: _stats_are(queue, waiting=0, running=1))
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: server.server._gate.closed)
        refused = await client.post(URL, json={"prompt": "x"})
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
        assert (await running).status_code == 200
        await asyncio.wait_for(server.task, 3)


async def test_the_grace_period_bounds_the_drain(queue: JobQueue) -> None:
    server = LiveServer(queue, ServerSettings(grace_s=0.2))
    async with StubEngine(queue, step_s=60), httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(lambda: _stats_are(queue, waiting=0, running=1))
        server.server.config.timeout_graceful_shutdown = 1
        await asyncio.wait_for(server.stop(), 5)
        await asyncio.wait([running])
        await until(lambda: _stats_are(queue, waiting=0, running=0))
