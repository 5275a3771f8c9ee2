"""`stream: true`: the events of generations and edits, their order, and what happens when something goes wrong."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import redis.asyncio
from redis.asyncio.client import Pipeline
from starlette.background import BackgroundTask
from starlette.types import Message

from engine.errors import QueueUnavailable
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobError, JobRecord
from engine.jobs.results import PartialImage
from server.responses.events import Event, EventStream
from tests.job_queue import JobQueue
from tests.jobs.helpers import submit
from tests.server.conftest import LiveServer, MakeClient
from tests.server.events import events_of
from tests.server.stub_engine import StubEngine, partial_image, plan_for, stub_image
from tests.server.test_edits import IMAGE, upload
from tests.server.test_errors import error_of
from tests.waiting import until

URL, EDITS = "/v1/images/generations", "/v1/images/edits"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("operation", ["image_generation", "image_edit"])
async def test_events_follow_the_contract(client: httpx.AsyncClient, stub: StubEngine, operation: str) -> None:
    before = int(time.time())
    fields = {"prompt": "a red fox", "seed": 42, "size": "128x64", "quality": "low"}
    fields |= {"stream": True, "partial_images": 2}
    if operation == "image_edit":
        form = {name: str(value).lower() for name, value in fields.items()}
        response = await client.post(EDITS, data=form, files=upload(("image", IMAGE)))
    else:
        response = await client.post(URL, json=fields)
    events = events_of(response)
    spec, sources = stub.specs[0], stub.sources[0]
    assert events.names == [f"{operation}.partial_image"] * 2 + [f"{operation}.completed"]
    for _, data in events.named:
        assert before <= data.pop("created_at") <= time.time()
    common = {"size": "128x64", "quality": "low", "background": "opaque", "output_format": "png"}
    assert events.of(f"{operation}.partial_image") == [
        {
            "type": f"{operation}.partial_image",
            "b64_json": encoded(partial_image(spec, 0, index, sources).data),
            "partial_image_index": index,
            **common,
        }
        for index in (0, 1)
    ]
    words, image_tokens = len(spec.prompt.split()), spec.source_tokens
    assert events.of(f"{operation}.completed") == [
        {
            "type": f"{operation}.completed",
            "b64_json": encoded(stub_image(spec, 42, sources)),
            "seed": 42,
            "usage": {
                "total_tokens": words + image_tokens + spec.plan_tokens,
                "input_tokens": words + image_tokens,
                "output_tokens": spec.plan_tokens,
                "input_tokens_details": {"text_tokens": words, "image_tokens": image_tokens},
                "output_tokens_details": {"text_tokens": 0, "image_tokens": spec.plan_tokens},
            },
            **common,
        }
    ]


async def test_several_images_of_a_request(client: httpx.AsyncClient, stub: StubEngine) -> None:
    fields = {"prompt": "foxes", "seed": 5, "n": 3, "stream": True, "partial_images": 1, "output_format": "jpeg"}
    events = events_of(await client.post(URL, json=fields))
    spec = stub.specs[0]
    partials, completed = (events.of(f"image_generation.{kind}") for kind in ("partial_image", "completed"))
    assert [data["image_index"] for data in partials] == [0, 1, 2]
    assert [data["b64_json"] for data in partials] == [encoded(partial_image(spec, i, 0).data) for i in range(3)]
    assert [(data["image_index"], data["seed"]) for data in completed] == [(0, 5), (1, 6), (2, 7)]
    assert [data["b64_json"] for data in completed] == [encoded(stub_image(spec, seed)) for seed in (5, 6, 7)]
    whole = (await client.post(URL, json={**fields, "stream": False})).json()["usage"]
    for count in ("total_tokens", "input_tokens", "output_tokens"):
        assert sum(data["usage"][count] for data in completed) == whole[count]


async def test_events_contain_plans_on_request(client: httpx.AsyncClient, stub: StubEngine) -> None:
    fields = {"prompt": "x", "seed": 1, "stream": True, "partial_images": 2, "return_plan": True}
    events = events_of(await client.post(URL, json=fields))
    plan = plan_for(stub.specs[0], 1).to_dict()
    preview = plan["preview"]
    of_plan = {name: plan[name] for name in ("rows", "cols", "tokens")}
    assert [data["plan"] for data in events.of("image_generation.partial_image")] == [preview, of_plan]
    assert [data["plan"] for data in events.of("image_generation.completed")] == [plan]


@pytest.mark.parametrize("partial_images", [None, 0])
async def test_without_partial_images(client: httpx.AsyncClient, stub: StubEngine, partial_images: int | None) -> None:
    fields = {"prompt": "x", "stream": True, "partial_images": partial_images}
    events = events_of(await client.post(URL, json=fields))
    assert events.names == ["image_generation.completed"]


async def test_a_stream_contains_data_whatever_the_default(make_client: MakeClient, stub: StubEngine) -> None:
    async with make_client(default_response_format="url") as client:
        events = events_of(await client.post(URL, json={"prompt": "x", "stream": True}))
    [completed] = events.of("image_generation.completed")
    assert completed["b64_json"]
    assert "url" not in completed


async def test_progress_is_sent_as_comments(client: httpx.AsyncClient, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=0.1):
        fields = {"prompt": "x", "stream": True, "partial_images": 3, "num_inference_steps": 8}
        events = events_of(await client.post(URL, json=fields))
    assert 'running {"phase":"rendering","step":1,"steps":8}' in events.comments


async def test_a_silent_stream_is_kept_alive(
    client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.responses.events.PING_INTERVAL_S", 0.1)
    async with StubEngine(queue, step_s=1):
        events = events_of(await client.post(URL, json={"prompt": "x", "stream": True, "num_inference_steps": 1}))
    assert events.comments.count("ping") >= 3
    assert events.names == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"n": 0}, "n"), ({"size": "9x9"}, "size"), ({"stream": "yes"}, "stream"), ({"strem": True}, "strem")],
)
async def test_invalid_requests_get_a_status(
    client: httpx.AsyncClient, stub: StubEngine, fields: dict[str, object], param: str
) -> None:
    response = await client.post(URL, json={"prompt": "x", "stream": True, **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_a_full_queue_gets_a_status(make_client: MakeClient, queue: JobQueue) -> None:
    async with make_client() as client:
        assert (await client.post(URL, json={"prompt": "x", "stream": True})).status_code == 503
    async with make_client(max_queue=0) as client:
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        full = await client.post(URL, json={"prompt": "x", "stream": True})
    assert (full.status_code, error_of(full)["code"]) == (429, "rate_limit_exceeded")


async def test_a_failure_is_the_last_event(client: httpx.AsyncClient, stub: StubEngine) -> None:
    stub.failures = {"x": JobError("Too long.", "invalid_request_error", "invalid_value", "prompt")}
    events = events_of(await client.post(URL, json={"prompt": "x", "stream": True, "partial_images": 1}))
    assert events.names == ["image_generation.partial_image", None]
    error = {"message": "Too long.", "type": "invalid_request_error", "param": "prompt", "code": "invalid_value"}
    assert events.named[-1][1] == {"error": error}


async def test_an_expired_job_is_the_last_event(client: httpx.AsyncClient, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=10):
        events = events_of(await client.post(URL, json={"prompt": "x", "stream": True, "timeout": 0.3}))
    [(name, data)] = events.named
    assert (name, data["error"]["code"], data["error"]["type"]) == (None, "deadline_exceeded", "server_error")


@pytest.mark.parametrize(
    ("raised", "code"), [(QueueUnavailable("gone"), "service_unavailable"), (RuntimeError("secret"), "internal_error")]
)
async def test_unexpected_errors_are_the_last_event(
    client: httpx.AsyncClient,
    stub: StubEngine,
    queue: JobQueue,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    code: str,
) -> None:
    updates = JobFollower.updates

    async def broken(self: JobFollower):
        async for update in updates(self):
            yield update
            raise raised

    monkeypatch.setattr(JobFollower, "updates", broken)
    events = events_of(await client.post(URL, json={"prompt": "x", "stream": True, "num_inference_steps": 1}))
    assert events.named[-1][0] is None
    assert events.named[-1][1]["error"]["code"] == code
    assert "secret" not in str(events)


async def test_a_partial_image_comes_long_before_the_last(live_server: LiveServer, queue: JobQueue) -> None:
    fields = {"prompt": "x", "stream": True, "partial_images": 1, "num_inference_steps": 1}
    async with (
        StubEngine(queue, step_s=4),
        httpx.AsyncClient(base_url=live_server.url, timeout=60) as client,
        client.stream("POST", URL, json=fields) as response,
    ):
        arrived = {}
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                arrived[line] = time.monotonic()
    first, last = arrived["event: image_generation.partial_image"], arrived["event: image_generation.completed"]
    assert last - first > 1.5


async def test_disconnecting_from_a_stream_cancels_its_job(live_server: LiveServer, queue: JobQueue) -> None:
    gate = live_server.server._gate
    async with StubEngine(queue, step_s=60), httpx.AsyncClient(base_url=live_server.url, timeout=60) as client:
        async with client.stream("POST", URL, json={"prompt": "x", "stream": True}) as response:
            assert response.status_code == 200
            assert gate.inside == 1
        await until(lambda: _nothing_remains(queue))
        await until(lambda: gate.inside == 0)


async def _nothing_remains(queue: JobQueue) -> bool:
    stats = await queue.stats()
    return (stats.waiting, stats.running) == (0, 0)


async def test_disconnecting_before_the_first_event(live_server: LiveServer, queue: JobQueue) -> None:
    """Nothing is sent while the job waits, but the disconnect must be noticed."""
    await queue.heartbeat(StubEngine(queue).info, "", 60)
    host, port = live_server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt": "x", "stream": true}'
    writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (URL.encode(), len(body), body))
    await writer.drain()
    await until(lambda: _one_waits(queue))
    writer.close()
    await writer.wait_closed()
    await until(lambda: _nothing_remains(queue))


async def _one_waits(queue: JobQueue) -> bool:
    return (await queue.stats()).waiting == 1


async def test_a_streamed_image_does_not_stay_in_redis(
    live_server: LiveServer, stub: StubEngine, redis_client: redis.asyncio.Redis
) -> None:
    async with httpx.AsyncClient(base_url=live_server.url, timeout=60) as client:
        await client.post(URL, json={"prompt": "x", "stream": True})

    async def goes_soon() -> bool:
        keys = await redis_client.keys("glimmer:result:*")
        return all([0 <= await redis_client.pttl(key) <= 5000 for key in keys])

    await until(goes_soon)


async def test_a_stream_survives_a_redis_outage_at_its_start(
    client: httpx.AsyncClient, stub: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    unharmed, failures = Pipeline.execute, iter([redis.ConnectionError("planted")] * 2)

    async def execute(*args: Any, **kwargs: Any) -> Any:
        if failure := next(failures, None):
            raise failure
        return await unharmed(*args, **kwargs)

    monkeypatch.setattr(Pipeline, "execute", execute)
    response = await client.post(URL, json={"prompt": "x", "stream": True})
    assert "image_generation.completed" in response.text
    assert next(failures, None) is None


async def test_every_ended_stream_is_counted(client: httpx.AsyncClient, stub: StubEngine) -> None:
    for _ in range(2):
        await client.post(URL, json={"prompt": "x", "stream": True})
    assert 'glimmer_api_jobs_total{state="succeeded"} 2.0' in (await client.get("/metrics")).text


async def test_partial_images_are_made_only_for_streams_and_jobs(client: httpx.AsyncClient, stub: StubEngine) -> None:
    await client.post(URL, json={"prompt": "x", "partial_images": 2})
    await client.post(URL, json={"prompt": "x", "partial_images": 2, "stream": True})
    await client.post(URL, json={"prompt": "x", "partial_images": 2}, headers={"prefer": "respond-async"})
    await until(lambda: len(stub.specs) == 3)
    assert [spec.partial_images for spec in stub.specs] == [0, 2, 2]


async def test_partial_images_come_before_the_end(queue: JobQueue, stub: StubEngine) -> None:
    """Streams rely on this."""
    job_id = await submit(queue, partial_images=3, n=2)
    updates = [update async for update in queue.follow(job_id)]
    partials = [(update.index, update.image) for update in updates if isinstance(update, PartialImage)]
    assert partials == [(index, image) for index in range(3) for image in range(2)]
    assert isinstance(updates[-1], JobRecord)


async def test_the_result_is_freed_even_after_a_disconnect() -> None:
    """Otherwise it would be kept for ten minutes."""
    let_go: list[str] = []

    async def endless() -> AsyncGenerator[Event]:
        await asyncio.sleep(60)
        yield [b""]

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    stream = EventStream(endless())
    stream.background = BackgroundTask(let_go.append, "the result")
    await asyncio.wait_for(stream({"type": "http"}, receive, send), 5)
    assert let_go == ["the result"]
