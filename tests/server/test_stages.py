"""What an API says and does when a stage has no engine."""

from dataclasses import replace

import httpx
import pytest

from engine.jobs.job import EngineInfo, JobState
from server.admission import queue_state
from server.admission.engine_directory import models_of, require_ready
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_operations import samples

URL = "/v1/images/generations"
ASYNC = {"prefer": "respond-async"}


@pytest.fixture(autouse=True)
def fresh_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_state, "CACHE_TTL_S", 0.0)


def engines_of(queue: JobQueue, *stages: str) -> list[EngineInfo]:
    """Return engines of stages, each with a state after a space if it is not ready."""
    ready = StubEngine(queue).info
    names = [[*stage.split(), "ready"] for stage in stages]
    return [replace(ready, id=f"e{number}", stage=name[0], state=name[1]) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([], "No engine is running."),
        (["all starting"], "The engine is still starting."),
        (["all draining", "all starting"], "No engine is ready (states: draining, starting)."),
        (["plan starting", "render starting"], "The engine is still starting."),
        (["plan"], "No engine renders."),
        (["render", "render stuck"], "No engine plans."),
        (["plan", "render starting"], "The engine that renders is still starting."),
        (["plan draining", "render"], "No engine that plans is ready (states: draining)."),
        (["plan", "all draining", "render stuck"], "No engine that renders is ready (states: draining, stuck)."),
        (["plan", "render"], None),
        (["all", "plan starting"], None),
        (["all starting", "render", "plan"], None),
    ],
)
async def test_health_and_answers_say_which_stage_is_missing(
    client: httpx.AsyncClient, queue: JobQueue, stages: list[str], reason: str | None
) -> None:
    for info in engines_of(queue, *stages):
        await queue.heartbeat(info, "", 60)
    health = await client.get("/health")
    answer = await client.post(URL, json={"prompt": "x"}, headers=ASYNC)
    assert (health.status_code, health.json().get("reason")) == ((503, reason) if reason else (200, None))
    assert answer.status_code == (503 if reason else 202)
    if reason:
        assert answer.json()["error"]["message"] == reason
        assert int(answer.headers["retry-after"]) > 0
    found = samples((await client.get("/metrics")).text)
    counts = {stage: found["glimmer_stage_engines", frozenset({("stage", stage), ("state", "ready")})]
              for stage in ("plan", "render")}  # fmt: skip
    ready = [stage for stage in stages if " " not in stage]
    assert counts == {stage: sum(name in ("all", stage) for name in ready) for stage in counts}
    assert (0 in counts.values()) == (reason is not None)


def test_defaults_come_from_an_engine_that_plans(queue: JobQueue) -> None:
    renderer, planner = engines_of(queue, "render", "plan")
    planner = replace(planner, max_prompt_tokens=99)
    assert require_ready([renderer, planner]) == planner


def test_models_are_compared_by_stage(queue: JobQueue) -> None:
    whole, planner, renderer, old = engines_of(queue, "all", "plan", "render", "all")
    whole = replace(whole, fingerprint="w", planner="p", renderer="r")
    planner, renderer, old = (
        replace(planner, planner="p"),
        replace(renderer, renderer="r"),
        replace(old, fingerprint="w"),
    )
    assert len(models_of([whole, planner, renderer, old])) == 1
    for other in (replace(planner, planner="q"), replace(renderer, renderer="s"), replace(old, fingerprint="v")):
        assert len(models_of([whole, planner, renderer, old, other])) == 2


async def test_requests_wait_for_an_autoscaler_once_an_engine_was_there(
    make_client: MakeClient, queue: JobQueue
) -> None:
    async with make_client(scale_to_zero=True) as client:
        assert (await client.get("/health")).json()["reason"] == "No engine is running."
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 503
        stub = StubEngine(queue)
        for info in engines_of(queue, "plan", "render"):
            await queue.heartbeat(replace(info, model=stub.info.model), "", 60)
            await queue.deregister(info.id)
        assert (await client.get("/health")).status_code == 200
        answer = await client.post(URL, json={"prompt": "x"}, headers=ASYNC)
        assert answer.status_code == 202
        found = samples((await client.get("/metrics")).text)
        assert found["glimmer_stage_backlog", frozenset({("stage", "plan")})] == 1
        async with stub:
            assert (await queue.wait(answer.json()["id"])).state is JobState.SUCCEEDED
        await queue.deregister(stub.info.id)
    async with make_client() as client:
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 503
