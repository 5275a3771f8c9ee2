"""Bounds on requests in progress: of a process, of a key, and of those that wait for one job."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks import stop
from server.admission.gate import FEW_REQUESTS, MAX_READERS_PER_JOB, MAX_WAITING_PER_JOB, Gate
from server.app import create_app
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of
from tests.server.test_keys import bearer, table
from tests.waiting import until

URL = "/v1/images/generations"


@asynccontextmanager
async def open_app(queue: JobQueue, **options: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """Yield an app with a ready engine that claims nothing, and a client of it."""
    await queue.heartbeat(StubEngine(queue).info, "", 60)
    app = create_app(ServerSettings(**options), queue)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        yield app, client


@asynccontextmanager
async def in_background(*requests: Any) -> AsyncIterator[list["asyncio.Task[httpx.Response]"]]:
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        yield tasks
    finally:
        for task in tasks:
            await stop(task)


def refusals(metrics: str, reason: str) -> float:
    name = f'glimmer_http_refused_total{{reason="{reason}"}} '
    return next(float(line.removeprefix(name)) for line in metrics.splitlines() if line.startswith(name))


async def test_a_process_bounds_its_requests_and_answers_probes(queue: JobQueue) -> None:
    """Waiting requests, repetitions and event streams count alike."""
    async with open_app(queue) as (app, client):
        app.state.gate.max_requests = 4
        job = (await client.post(URL, json={"prompt": "x"}, headers={"prefer": "respond-async"})).json()["id"]
        keyed = {"idempotency-key": "k"}
        async with in_background(
            client.post(URL, json={"prompt": "x"}),
            client.post(URL, json={"prompt": "x"}, headers=keyed),
            client.post(URL, json={"prompt": "x"}, headers=keyed),
            client.get(f"/v1/jobs/{job}/events"),
        ):
            await until(lambda: app.state.gate.inside == 4)
            for send in (lambda: client.get("/v1/models"), lambda: client.post(URL, json={"prompt": "x"})):
                refused = await asyncio.wait_for(send(), 20)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) > 0
                assert "too many requests" in error_of(refused)["message"]
            assert (await client.get("/live")).status_code == 200
            assert (await client.get("/health")).status_code == 200
            assert refusals((await client.get("/metrics")).text, "requests") == 2
        await until(lambda: app.state.gate.inside == 0)
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_key_has_half_of_the_places(queue: JobQueue, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(table("alice", "a") + table("bob", "b"))
    async with open_app(queue, api_keys_file=tmp_path / "keys.toml") as (app, client):
        app.state.gate.max_requests = 4
        body, alice, bob = {"prompt": "x"}, bearer("a"), bearer("b")
        async with in_background(*(client.post(URL, json=body, headers=alice) for _ in range(2))):
            await until(lambda: app.state.gate.inside == 2)
            refused = await client.get("/v1/models", headers=alice)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) > 0
            assert (await client.get("/v1/models", headers=bob)).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
        await until(lambda: app.state.gate.inside == 0)
        assert (await client.get("/v1/models", headers=alice)).status_code == 200


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 200)), max_size=8))
@settings(max_examples=50, deadline=None)
def test_keys_with_many_requests_leave_places_to_others(requests: list[tuple[str, int]]) -> None:
    """Whatever some keys hold, another gets in with a few requests."""
    gate = Gate(Metrics())
    gate.max_requests = 8 * FEW_REQUESTS * 4
    with ExitStack() as held:
        for owner, count in requests:
            for _ in range(count):
                with suppress(ApiError), ExitStack() as one:
                    one.enter_context(gate.request())
                    one.enter_context(gate.request_of(owner))
                    held.push(one.pop_all())
        for _ in range(FEW_REQUESTS):
            held.enter_context(gate.request())
            held.enter_context(gate.request_of("e"))


async def test_repetitions_of_an_idempotency_key_are_bounded(queue: JobQueue) -> None:
    async with open_app(queue) as (app, client), AsyncExitStack() as waiting:

        def post(key: str) -> Any:
            return client.post(URL, json={"prompt": "x"}, headers={"idempotency-key": key})

        tasks = await waiting.enter_async_context(in_background(*(post("a") for _ in range(MAX_WAITING_PER_JOB))))
        await until(lambda: app.state.gate._of_jobs.total() == MAX_WAITING_PER_JOB)
        refused = await asyncio.wait_for(post("a"), 20)
        assert (refused.status_code, error_of(refused)["param"]) == (429, "Idempotency-Key")
        await waiting.enter_async_context(in_background(post("b")))
        await until(lambda: app.state.gate._of_jobs.total() == MAX_WAITING_PER_JOB + 1)  # another key is not affected
        await stop(tasks[0])  # a lost connection makes room for its retry
        await until(lambda: app.state.gate._of_jobs.total() == MAX_WAITING_PER_JOB)
        async with StubEngine(queue):
            retried = await asyncio.wait_for(post("a"), 20)
            await asyncio.wait(tasks, timeout=20)
        assert retried.status_code == 200
        assert {task.result().content for task in tasks[1:]} == {retried.content}


READERS = {"GET": "/v1/jobs/{id}", "HEAD": "/v1/jobs/{id}", "EVENTS": "/v1/jobs/{id}/events"}


@pytest.mark.parametrize("kind", READERS)
async def test_requests_for_one_job_are_bounded(queue: JobQueue, kind: str) -> None:
    async with open_app(queue) as (app, client), AsyncExitStack() as reading:
        wanted = {"prefer": "respond-async"}
        first, second = [(await client.post(URL, json={"prompt": "x"}, headers=wanted)).json()["id"] for _ in "12"]
        streams = [client.get(f"/v1/jobs/{first}/events") for _ in range(MAX_READERS_PER_JOB)]
        tasks = await reading.enter_async_context(in_background(*streams))
        await until(lambda: app.state.gate._readers[first] == MAX_READERS_PER_JOB)
        method, path = kind.replace("EVENTS", "GET"), READERS[kind]
        refused = await asyncio.wait_for(client.request(method, path.format(id=first)), 20)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert (await client.get(f"/v1/jobs/{second}")).status_code == 200
        await stop(tasks[0])
        await until(lambda: app.state.gate._readers[first] == MAX_READERS_PER_JOB - 1)
        assert (await client.get(f"/v1/jobs/{first}")).status_code == 200
        assert (await client.delete(f"/v1/jobs/{first}")).status_code == 200  # is never refused, and ends the streams
        await asyncio.wait(tasks, timeout=20)
        assert not app.state.gate._readers


def test_a_request_for_each_waiting_job_fits() -> None:
    assert Gate(Metrics(), max_queue=5_000).max_requests >= 10_000
