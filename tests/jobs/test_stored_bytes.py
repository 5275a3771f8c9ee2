"""The exact bytes in Redis: processes of an older and a newer version share a queue."""

from typing import Any

import orjson
import redis.asyncio

from engine.jobs.job import EngineInfo, JobError, Origin, Plan, SourceImages, TokenGrid
from engine.jobs.results import PartialImage
from server.admission.keys import Caller
from server.admission.rate_limits import RateLimits
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, spec

SPEC = spec(prompt='Ein "Schild" ü\n', seed=2**63 - 1, n=10, width=2048, height=2048, num_sources=2, source_tokens=24)
SOURCES = SourceImages([b"\0\xff" * 1000, b""], b"overlay")
SPEC_JSON = (
    '{"prompt":"Ein \\"Schild\\" ü\\n","width":2048,"height":2048,"seed":9223372036854775807,"n":10,'
    '"num_inference_steps":50,"guidance_scale":1.5,"negative_prompt":"","temperature":null,"top_p":null,"plan":null,'
    '"return_plan":false,"output_format":"png","output_compression":100,"partial_images":0,"sources":2,'
    '"source_tokens":24,"model":"","embed_prompt":false,"quotes":"reference"}'
).encode()
ENDED_SPEC_JSON = SPEC_JSON.replace(b'Ein \\"Schild\\" \xc3\xbc\\n', b"")
YEAR_S = 365 * 86_400


async def _submit(queue: JobQueue) -> None:
    await queue.submit(
        SPEC,
        job_id="ü:1",
        timeout_s=YEAR_S,
        priority="batch",
        max_queue=10**6,
        source_images=SOURCES,
        max_source_bytes=2**53,
        notes={"empty": [], "none": None, "share": 0.1},
        ended_notes={"empty": []},
        url_copies=True,
        owner="anna",
        max_owned=4,
        idempotency_key="k",
        fingerprint="f",
        origin=Origin("req_1", "00-1"),
    )


async def _record(client: Any) -> dict[bytes, bytes]:
    return await client.hgetall("glimmer:job:ü:1")


async def test_a_submitted_job(queue: JobQueue, redis_client: Any) -> None:
    await _submit(queue)
    record = await _record(redis_client)
    submitted_at, [[entry, fields]] = int(record[b"submitted_at"]), await redis_client.xrange("glimmer:queue:batch")
    assert fields == {b"job": "ü:1".encode()}
    assert record == {
        b"state": b"queued",
        b"priority": b"batch",
        b"spec": SPEC_JSON,
        b"sequence": b"1",
        b"entry": entry,
        b"images": b"10",
        b"kv_tokens": b"%d" % (10 * 4096 + 16 + 64 + 24),
        b"source_tokens": b"24",
        b"work": b"%d" % (10 * 2048 * 2048 * 50),
        b"submitted_at": b"%d" % submitted_at,
        b"deadline": b"%d" % (submitted_at + 1000 * YEAR_S),
        b"epoch": b"0",
        b"runs": b"0",
        b"owner": b"anna",
        b"notes": b'{"empty":[],"none":null,"share":0.1}',
        b"ended_spec": ENDED_SPEC_JSON,
        b"ended_notes": b'{"empty":[]}',
        b"origin": b'{"request_id":"req_1","traceparent":"00-1"}',
        b"source_bytes": b"2007",
        b"url_copies": b"1",
        b"idempotency_key": b"k",
    }
    assert await redis_client.hgetall("glimmer:sources:ü:1") == {
        b"0": b"\0\xff" * 1000,
        b"1": b"",
        b"overlay": b"overlay",
    }
    assert await redis_client.hgetall("glimmer:counters") == {b"submitted": b"1", b"source_bytes": b"2007"}
    assert await redis_client.zrange("glimmer:waiting", 0, -1, withscores=True) == [("ü:1".encode(), 1.0)]
    assert await redis_client.smembers("glimmer:owned:anna") == {"ü:1".encode()}
    assert await redis_client.get("glimmer:idempotency:k") == "f ü:1".encode()
    left_ms = await redis_client.pttl("glimmer:idempotency:k")
    assert 0 <= 1000 * (YEAR_S + queue.result_ttl_s) - left_ms < 60_000


async def test_a_running_job(queue: JobQueue, redis_client: Any) -> None:
    await _submit(queue)
    held = await claim(queue, "engine-1", IDLE)
    await queue.progress(held, {"phase": "rendering", "share": 0.1})
    await queue.checkpoint_plan(held, 9, Plan(1, 1, [16383], TokenGrid(1, 1, [])))
    await queue.partial_image(held, PartialImage(9, 2, b"\0\xff", {"rows": 1}))
    record = await _record(redis_client)
    assert {name: record[name] for name in (b"state", b"engine", b"epoch", b"runs", b"progress", b"confirmed")} == {
        b"confirmed": b"1",
        b"state": b"running",
        b"engine": b"engine-1",
        b"epoch": b"1",
        b"runs": b"1",
        b"progress": b'{"phase":"rendering","share":0.1}',
    }
    plan = b'{"rows":1,"cols":1,"tokens":[16383],"preview":{"rows":1,"cols":1,"tokens":[]}}'
    assert await redis_client.hgetall("glimmer:plans:ü:1") == {b"9": plan}
    assert await redis_client.hgetall("glimmer:partials:ü:1") == {b"9:2": b"\0\xff", b"9:2:grid": b'{"rows":1}'}
    assert (await redis_client.hgetall("glimmer:counters"))[b"granted"] == b"1"
    await queue.requeue("engine-1", held)
    record = await _record(redis_client)
    assert (record[b"state"], record[b"epoch"], record[b"runs"]) == (b"queued", b"1", b"0")
    assert not record.keys() & {b"engine", b"progress"}
    [pending] = await redis_client.xpending_range("glimmer:queue:batch", "engines", "-", "+", 10)
    assert pending["consumer"] == b"handed-back"


async def test_ended_jobs(queue: JobQueue, redis_client: Any) -> None:
    await _submit(queue)
    await queue.commit(await claim(queue, "engine-1", IDLE), RESULT)
    assert (await _record(redis_client))[b"state"] == b"succeeded"
    assert await redis_client.hgetall("glimmer:result:ü:1") == {
        b"meta": b'{"images":[{"seed":7,"plan":null}],"prompt_tokens":5,"plan_tokens":260,"source_tokens":0}',
        b"image:0": bytes(range(256)),
    }
    counters = {b"submitted": b"1", b"granted": b"1", b"source_bytes": b"0"}
    assert await redis_client.hgetall("glimmer:counters") == counters
    await queue.submit(spec(), job_id="b", timeout_s=60, priority="interactive", max_queue=1)
    await queue.fail(await claim(queue), JobError("zu lang: ü", "invalid_request_error", None, "prompt"))
    error = '{"message":"zu lang: ü","type":"invalid_request_error","code":null,"param":"prompt"}'
    assert await redis_client.hget("glimmer:job:b", "error") == error.encode()
    await queue.discard("unknown")
    assert await redis_client.get("glimmer:withdrawn:unknown") == b"1"


async def test_a_dead_lettered_job(redis_client: redis.asyncio.Redis) -> None:
    queue, client = JobQueue(redis_client), redis_client
    await _submit(queue)
    for _ in range(3):
        await queue.progress(await claim(queue, "engine-1", IDLE), {"phase": "rendering", "step": 3, "steps": 9})
        await queue.requeue_all("engine-1")
    death = orjson.loads((await _record(client))[b"death:3"])
    assert death == {"dead": "engine-1", "alone": True, "phase": "rendering", "step": 3, "steps": 9}
    assert (await _record(client))[b"alone"] == b"3"
    assert await queue.claim("engine-2", IDLE) is None
    record = await _record(client)
    assert record[b"state"] == b"failed"
    message = b"The job brought its engine down each time it ran and was given up."
    assert record[b"error"] == b'{"message":"%s","type":"server_error","code":null,"param":null}' % message
    assert await client.hget("glimmer:counters", "given_up") == b"1"  # type: ignore[misc]


async def test_events(queue: JobQueue, redis_client: Any) -> None:
    async with redis_client.pubsub() as pubsub:
        await pubsub.subscribe("glimmer:events", "glimmer:wake")
        await _submit(queue)
        held = await claim(queue, "engine-1", IDLE)
        await queue.progress(held, {"step": 1})
        await queue.partial_image(held, PartialImage(0, 1, b"x"))
        await queue.requeue("engine-1", held)
        await queue.cancel("ü:1")
        messages = []
        while (message := await pubsub.get_message(timeout=0.1)) is not None:
            if message["type"] == "message":
                messages.append((message["channel"].decode(), message["data"].decode()))
    assert [data for channel, data in messages if channel == "glimmer:wake"] == ["ü:1", "ü:1"]
    events = [data for channel, data in messages if channel == "glimmer:events"]
    assert [data for data in events if "state" not in data] == [
        '{"job":"ü:1","progress":{"step":1}}',
        '{"job":"ü:1","partial":"0:1"}',
    ]
    in_any_order = ({f'{{"job":"ü:1","state":"{state}"}}', f'{{"state":"{state}","job":"ü:1"}}'} for state in STATES)
    for data, expected in zip((data for data in events if "state" in data), in_any_order, strict=True):
        assert data in expected


STATES = ("running", "queued", "cancelled")


async def test_a_heartbeat(queue: JobQueue, redis_client: Any) -> None:
    info = EngineInfo("e1", 1, "all", "ready", "nano", "512x512", 16384, 1024)
    await queue.heartbeat(info, "glimmer_x 1\n", ttl_s=60)
    info_json = (
        b'{"id":"e1","pid":1,"stage":"all","state":"ready","model":"nano","default_size":"512x512",'
        b'"codebook_size":16384,"max_prompt_tokens":1024,"images_running":0,"default_steps":50,"default_guidance":1.5,'
        b'"fingerprint":"","planner":"","renderer":"","max_text_characters":null}'
    )
    assert await redis_client.hgetall("glimmer:engine:e1") == {b"info": info_json, b"metrics": b"glimmer_x 1\n"}
    assert 0 < await redis_client.pttl("glimmer:engine:e1") <= 60_000
    assert await redis_client.smembers("glimmer:engines") == {b"e1"}


async def test_a_charge_and_a_refund(queue: JobQueue, redis_client: Any) -> None:
    limits, caller = RateLimits(queue), Caller("anna", requests_per_minute=100_000, pixel_steps_per_day=2**53 - 1)
    charge = await limits.charge(caller, 2**53 - 1)
    [(ticket, time_ms)] = await redis_client.zrange("glimmer:rate:anna", 0, -1, withscores=True)
    assert (ticket, time_ms % 1) == (charge.ticket.encode(), 0)
    quota = f"glimmer:quota:anna:{int(time_ms) // 86_400_000}"
    assert await redis_client.get(quota) == b"9007199254740991"
    await limits.refund(charge)
    assert await redis_client.get(quota) == b"0"
