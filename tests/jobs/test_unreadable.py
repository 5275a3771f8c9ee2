"""Records of a newer format, damaged records, and errors of Redis: each costs no more than its own job."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings

from engine.errors import QueueUnavailable, UnreadableJob
from engine.jobs import connection
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import EngineInfo, JobSpec, JobState, SourceImages
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, TIMEOUT_S, claim, pass_deadline, submit
from tests.waiting import until

JOB = "glimmer:job:bad"


def _set(name: str, value: str | bytes) -> Callable[[Any], Awaitable[Any]]:
    return lambda client: client.hset(JOB, name, value)


def _remove(name: str) -> Callable[[Any], Awaitable[Any]]:
    return lambda client: client.hdel(JOB, name)


def _replace(key: str) -> Callable[[Any], Awaitable[Any]]:
    async def replace(client: Any) -> None:
        await client.delete(key)
        await client.set(key, "text")

    return replace


SPEC = '{"prompt":"p","width":64,"height":64,"seed":1,"n":1'
DAMAGES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    **{
        f"without {name}": _remove(name) for name in ("state", "spec", "priority", "entry", "deadline", "epoch", "runs")
    },
    **{
        f"{name} is a word": _set(name, "x") for name in ("state", "priority", "deadline", "images", "sequence", "runs")
    },
    **{f"{name} is no JSON": _set(name, b"{\xff") for name in ("spec", "origin")},
    **{f"{name} is a list": _set(name, "[]") for name in ("spec", "origin")},
    "spec lacks a field": _set("spec", '{"prompt":"p","width":64,"height":64}'),
    "spec has text for a number": _set("spec", SPEC.replace("64", '"64"') + "}"),
    "spec has a number for text": _set("spec", SPEC.replace('"p"', "7") + "}"),
    "spec asks for a million images": _set("spec", SPEC.replace('"n":1', '"n":1000000') + "}"),
    "spec asks for no image": _set("spec", SPEC.replace('"n":1', '"n":0') + "}"),
    "format is a word": _set("format", "x"),
    "record is a string": _replace(JOB),
    "plans are a string": _replace("glimmer:plans:bad"),
    "plan is no JSON": lambda client: client.hset("glimmer:plans:bad", "0", b"\xff"),
    "plan of text": lambda client: client.hset("glimmer:plans:bad", "0", '{"rows":1,"cols":1,"tokens":["a"]}'),
    "plan is too short": lambda client: client.hset("glimmer:plans:bad", "0", '{"rows":2,"cols":2,"tokens":[1]}'),
    "plan of no image": lambda client: client.hset("glimmer:plans:bad", "x", '{"rows":1,"cols":1,"tokens":[1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["queued", "running", "lapsed"])
async def test_a_damaged_job_fails_alone(queue: JobQueue, redis_client: redis.asyncio.Redis, damage: str, when: str):
    await submit(queue, job_id="bad")
    claims = [await claim(queue, "engine-1")] if when != "queued" else []
    good = [await submit(queue) for _ in range(2)]
    claims += [await claim(queue, "engine-1")] if when != "queued" else []
    await DAMAGES[damage](redis_client)
    engine = JobQueue(redis_client, lease_ms=0) if when == "lapsed" else queue
    if when == "running":
        assert claims[1] not in await queue.renew("engine-1", claims)
        assert await queue.requeue("engine-1", claims[1])
        await queue.requeue_all("engine-1")
    ended = await queue.ended_among(["bad", *good])
    assert ended.keys() <= {"bad"}
    done = {(await claim(engine, "engine-2", IDLE)).job_id}
    for _ in range(2):
        granted = await queue.claim("engine-2", IDLE)
        done |= {granted.job_id} if granted else set()
    assert done == set(good), "others are claimed, it is not"
    assert await redis_client.hget(JOB, "state") == b"failed"  # type: ignore[misc]
    assert b'"job_unreadable"' in await redis_client.hget(JOB, "error")  # type: ignore[misc, operator]
    assert await redis_client.pttl(JOB) > 0
    assert (await queue.stats()).waiting == 0
    assert not await redis_client.sismember("glimmer:running", "bad")  # type: ignore[misc]


@pytest.mark.parametrize(("name", "value"), [("entry", "9-9"), ("priority", "batch")])
async def test_a_job_that_cannot_be_at_its_place_fails(
    queue: JobQueue, redis_client: redis.asyncio.Redis, name: str, value: str
):
    await submit(queue, job_id="bad")
    await redis_client.hset(JOB, name, value)  # type: ignore[misc]
    assert await queue.claim("engine-1", IDLE) is None
    assert await redis_client.hget(JOB, "state") == b"failed"  # type: ignore[misc]
    assert await redis_client.xlen("glimmer:queue:interactive") == 0


NUMBERS = (
    "sequence", "images", "kv_tokens", "source_tokens", "source_bytes", "url_copies", "work", "submitted_at",
    "deadline", "epoch", "runs", "format", "confirmed", "alone", "absolved",
)  # fmt: skip
FIELDS = (
    *NUMBERS, "state", "priority", "entry", "engine", "api", "owner", "progress", "spec", "notes", "origin",
    "ended_spec", "ended_notes", "idempotency_key", "death:1",
)  # fmt: skip
STRANGE = [
    "1.5",
    "nan",
    "-nan",
    "inf",
    "1e300",
    "1e3",
    "0x10",
    " 1",
    "007",
    "-0",
    "-1",
    "9" * 15,
    "9" * 16,
    "1" * 400,
    "",
]
NUMBER_IN_JSON = [f'{{"phase":"x","step":{number},"steps":{number}}}' for number in ("1e999", "nan", '"inf"', "-1e999")]
VALUES = st.sampled_from([*STRANGE, *NUMBER_IN_JSON, "batch", "queued", "running", "succeeded", "9-9", "9" * 30 + "-0"])


@given(st.sampled_from(FIELDS), VALUES | st.text() | st.binary(), st.sampled_from(["queued", "running", "suspected"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_of_any_field_stops_a_script_or_other_jobs(
    module_server: EmbeddedRedis, name: str, value: str | bytes, when: str
):
    asyncio.run(_damage(module_server, name, value, when))


@pytest.mark.parametrize("name", [*NUMBERS, "entry", "progress", "priority"])
def test_no_strange_number_stops_a_script_or_other_jobs(module_server: EmbeddedRedis, name: str):
    async def damage() -> None:
        for value in STRANGE + NUMBER_IN_JSON if name != "priority" else ["batch", "x"]:
            for when in ("running", "suspected"):
                await _damage(module_server, name, value, when)

    asyncio.run(damage())


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), fsync="no") as server:
        yield server


async def _damage(server: EmbeddedRedis, name: str, value: str | bytes, when: str) -> None:
    client = connect(server.url)
    queue, late = JobQueue(client, lease_ms=60_000), JobQueue(client, lease_ms=0)
    await submit(queue, job_id="bad", owner="anna", source_images=SourceImages([b"image"]), url_copies=True)
    held = None
    if when == "suspected":
        await claim(queue, "dead", IDLE)
        await queue.requeue_all("dead")
    if when != "queued":
        held = await claim(queue, "engine-1", IDLE)
    await client.hset(JOB, name, value)  # type: ignore[misc, arg-type]
    good = {await submit(queue, owner="bob") for _ in range(2)}
    if held:
        await queue.progress(held, {"step": 1}) if name != "progress" else None
        await queue.renew("engine-1", [held])
        await (queue.commit(held, RESULT) if len(value) % 2 else queue.requeue_all("engine-1"))
    served = set[str]()
    while granted := await late.claim("engine-2", IDLE):
        await late.commit(granted, RESULT)
        served.add(granted.job_id)
    assert served >= good
    await queue.ended_among(["bad"])
    await queue.discard("bad")
    await queue.shorten_ttl("bad")
    await submit(queue, job_id="next", max_queue=1, max_source_bytes=10**6, source_images=SourceImages([b"image"]))
    stats = await queue.stats()
    assert (stats.waiting, stats.running) == (1, 0)
    await client.flushdb()
    await client.aclose()


@pytest.mark.parametrize("damage", ["without priority", "priority is a word", "deadline is a word", "runs is a word"])
async def test_a_damaged_job_cannot_be_committed(queue: JobQueue, redis_client: redis.asyncio.Redis, damage: str):
    await submit(queue, job_id="bad")
    held = await claim(queue)
    await DAMAGES[damage](redis_client)
    assert not await queue.commit(held, RESULT)
    assert await redis_client.hget(JOB, "state") == b"failed"  # type: ignore[misc]
    assert await redis_client.exists("glimmer:result:bad") == 0


@pytest.mark.parametrize("call", ["cancel", "discard", "expire"])
@pytest.mark.parametrize("damage", ["without priority", "deadline is a word", "record is a string", "spec is a list"])
async def test_a_damaged_job_can_be_ended(queue: JobQueue, redis_client: redis.asyncio.Redis, damage: str, call: str):
    await submit(queue, job_id="bad")
    await DAMAGES[damage](redis_client)
    await getattr(queue, call)("bad")
    assert await queue.claim("engine-1", IDLE) is None
    assert (await queue.stats()).waiting == 0


@pytest.mark.parametrize("damage", ["without spec", "spec is no JSON", "deadline is a word", "record is a string"])
async def test_readers_get_an_error_for_the_damaged_job_only(
    queue: JobQueue, redis_client: redis.asyncio.Redis, damage: str, caplog: pytest.LogCaptureFixture
):
    await submit(queue, job_id="bad")
    other = await submit(queue)
    await DAMAGES[damage](redis_client)
    for read in (queue.get("bad"), asyncio.wait_for(queue.wait("bad"), TIMEOUT_S) if "spec" not in damage else None):
        if read is not None:
            with pytest.raises(UnreadableJob):
                await read
    assert "job_unreadable job=bad" in caplog.text
    assert await queue.get(other) is not None


async def test_damaged_images_results_and_heartbeats(queue: JobQueue, redis_client: redis.asyncio.Redis):
    await submit(queue, job_id="bad", source_images=SourceImages([b"image"]))
    granted = await claim(queue)
    await _replace("glimmer:sources:bad")(redis_client)
    with pytest.raises(UnreadableJob):
        await queue.source_images(granted)
    await queue.commit(granted, RESULT)
    await redis_client.hdel("glimmer:result:bad", "image:0")  # type: ignore[misc]
    with pytest.raises(UnreadableJob):
        await queue.result("bad")
    await redis_client.set("glimmer:plan:key", '{"rows":1}')
    assert await queue.cached_plans(["key"]) == [None]
    info = EngineInfo("good", 1, "all", "ready", "nano", "512x512", 16384, 1024)
    await queue.heartbeat(info, "", ttl_s=60)
    for number, damaged in enumerate((b"{", b"[]", b'{"id":"x"}', info.to_dict() | {"pid": "one"})):
        await queue.heartbeat(info, "", ttl_s=60)
        value = damaged if isinstance(damaged, bytes) else str(damaged).replace("'", '"').encode()
        await redis_client.hset(f"glimmer:engine:bad-{number}", "info", value)  # type: ignore[misc]
        await redis_client.sadd("glimmer:engines", f"bad-{number}")  # type: ignore[misc]
    assert await queue.engines() == [info]


async def _is_followed(client: Any) -> bool:
    [(_, subscribers)] = await client.pubsub_numsub("glimmer:events")
    return subscribers > 0


async def test_unreadable_events_are_ignored(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    ends = queue.ended()
    next_end = asyncio.ensure_future(anext(ends))
    await until(lambda: _is_followed(redis_client), TIMEOUT_S)
    for message in (b"\xff", b"[]", b"{}", b'{"job":["a"],"state":{}}'):
        await redis_client.publish("glimmer:events", message)
    await queue.cancel(job_id)
    assert await asyncio.wait_for(next_end, TIMEOUT_S) == job_id


# --- formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewerSpec(JobSpec):
    style: str = field(default="", metadata={"format": 3})


def test_the_format_of_a_job_is_the_newest_of_its_fields_in_use():
    assert JobSpec("p", 64, 64, seed=1, n=3, temperature=0.0).format == 1
    assert NewerSpec("p", 64, 64, seed=1).format == 1
    assert NewerSpec("p", 64, 64, seed=1, style="bold").format == 3


async def test_jobs_of_a_newer_format_wait_for_a_newer_engine(queue: JobQueue, redis_client: redis.asyncio.Redis):
    newer, old = JobQueue(redis_client), queue
    newer.known_format = 3
    spec = NewerSpec("p", 64, 64, seed=1, style="bold")
    for name in ("n1", "n2", "n3", "n4"):
        await queue.submit(spec, job_id=name, timeout_s=60, priority="interactive", max_queue=9)
    o1 = await submit(queue)
    assert (await claim(old)).job_id == o1
    assert await old.claim("engine-1", IDLE) is None
    assert await queue.cancel("n1")
    await pass_deadline(queue, "n2")
    o2 = await submit(queue)
    assert (await claim(old)).job_id == o2
    record = await queue.get("n2")
    assert record is not None
    assert record.state is JobState.EXPIRED
    assert (await queue.stats()).waiting == 2
    assert [(await claim(newer, "newer")).job_id for _ in range(2)] == ["n3", "n4"]
    assert await redis_client.xlen("glimmer:queue:interactive") == 4


async def test_many_jobs_of_a_newer_format_cost_a_claim_little(queue: JobQueue, redis_client: redis.asyncio.Redis):
    """Jobs of its own format behind them are found, handed back ones, too."""
    number, commands = 200, 120
    handed_back = None
    for index in range(number):
        await submit(queue, job_id=f"newer-{index}", max_queue=1000)
        if index == number // 2:
            handed_back = await submit(queue, max_queue=1000)
    claims = [await claim(queue, "engine-1") for _ in range(number + 1)]
    for held in claims:
        await queue.requeue("engine-1", held)
        if held.job_id.startswith("newer"):
            await redis_client.hset(f"glimmer:job:{held.job_id}", "format", 9)  # type: ignore[misc]
    found = 0
    for _ in range(number // 8):
        await redis_client.config_resetstat()
        granted = await queue.claim("engine-1", IDLE)
        stats: Any = await redis_client.info("commandstats")
        assert sum(command["calls"] for command in stats.values()) < commands
        if granted:
            assert granted.job_id == handed_back
            await queue.requeue("engine-1", granted)
            found += 1
    assert found
    assert (await queue.stats()).waiting == number + 1


async def test_many_new_jobs_of_a_newer_format_are_passed_over_in_parts(
    queue: JobQueue, redis_client: redis.asyncio.Redis
):
    for index in range(200):
        await submit(queue, job_id=f"newer-{index}", max_queue=1000)
        await redis_client.hset(f"glimmer:job:newer-{index}", "format", 9)  # type: ignore[misc]
    own = await submit(queue, max_queue=1000)
    await redis_client.config_resetstat()
    assert (await claim(queue)).job_id == own
    stats: Any = await redis_client.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] > 3


# --- errors of Redis --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
async def own_queue(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobQueue]:
    monkeypatch.setattr(connection, "_reported_at", {})
    client = connect(server.url)
    queue = JobQueue(client, lease_ms=60_000)
    yield queue
    await queue.close()
    await client.aclose()


async def _wrong_type(client: redis.asyncio.Redis) -> None:
    for key in ("waiting", "engines", "events", "counters"):
        await client.delete(f"glimmer:{key}")
        await client.set(f"glimmer:{key}", "text")


async def _no_permission(client: redis.asyncio.Redis) -> None:
    await client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-@scripting"])


async def _unknown(client: redis.asyncio.Redis) -> None:
    await client.config_set("lua-time-limit", 5)
    await client.execute_command("ACL", "SETUSER", "default", "-evalsha")


FAULTS = {"WRONGTYPE": _wrong_type, "NOPERM": _no_permission, "a refused command": _unknown}


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_error_of_redis_is_an_outage_and_logged_once(
    own_queue: JobQueue, fault: str, caplog: pytest.LogCaptureFixture
):
    await FAULTS[fault](own_queue.client)
    info = EngineInfo("engine-1", 1, "all", "ready", "nano", "512x512", 16384, 1024)
    for _ in range(5):
        for call in (lambda: submit(own_queue), lambda: own_queue.heartbeat(info, "", 60)):
            with pytest.raises(QueueUnavailable):
                await call()
    [line] = [record for record in caplog.records if "queue_unavailable" in record.getMessage()]
    assert line.levelno == logging.ERROR


async def test_a_busy_redis_is_an_outage(own_queue: JobQueue, server: EmbeddedRedis):
    await own_queue.client.config_set("lua-time-limit", 1)
    blocking = connect(server.url)
    script = asyncio.ensure_future(blocking.eval("while true do end", 0))  # type: ignore[arg-type]
    await asyncio.sleep(0.2)
    with pytest.raises(QueueUnavailable, match="BUSY"):
        await own_queue.claim("engine-1", IDLE)
    await own_queue.client.script_kill()
    await asyncio.wait([script])
    assert script.exception()
    await blocking.aclose()
    assert await own_queue.claim("engine-1", IDLE) is None
