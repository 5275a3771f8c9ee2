"""The limits of a key: counted once, across replicas, and refunded if no job results."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import hypothesis.strategies as st
import openai
import pytest
import redis.asyncio
from hypothesis import given, settings

from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import JobSpec, MemoryUse
from server import redis_timeout
from server.admission import abandoned_jobs as abandoned_jobs_module
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admission, Idempotency
from server.admission.keys import ANONYMOUS, Caller
from server.admission.rate_limits import NO_CHARGE, Charge, RateLimits
from server.admission.redis_memory import RedisMemory
from server.app import create_app
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.jobs.helpers import RESULT, claim, kill
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of
from tests.server.test_keys import bearer, table
from tests.waiting import until

URL = "/v1/images/generations"
SPEC = JobSpec("x", 64, 64, 1)
STEPS = 64 * 64 * SPEC.num_inference_steps

FAST = Caller("alice", requests_per_minute=3)
FRUGAL = Caller("alice", pixel_steps_per_day=1000)
BOTH = Caller("alice", requests_per_minute=2, pixel_steps_per_day=1000)


@pytest.fixture
def limits(queue: JobQueue) -> RateLimits:
    return RateLimits(queue)


@pytest.fixture
def admission(queue: JobQueue) -> Admission:
    return Admission(queue, RateLimits(queue), 100, AbandonedJobs(queue, Metrics()))


async def refusal(limits: RateLimits, caller: Caller, pixel_steps: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await limits.charge(caller, pixel_steps)
    assert caught.value.status == 429
    return caught.value


async def used(client: redis.asyncio.Redis) -> tuple[int, int]:
    """Return the requests of the minute and the pixel-steps of the day charged to alice."""
    (quota,) = await client.keys("glimmer:quota:alice:*") or [b""]
    return await client.zcard("glimmer:rate:alice"), int(await client.get(quota) or 0)


class TestRate:
    async def test_headers_count_down_to_a_refusal(self, limits: RateLimits) -> None:
        for left in (2, 1, 0):
            headers = (await limits.charge(FAST, 1)).headers
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            assert headers["x-ratelimit-reset-requests"] == "60s"
        refused = await refusal(limits, FAST)
        assert refused.code == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 55 <= int(refused.headers["retry-after"]) <= 60

    async def test_requests_expire_after_a_minute(self, limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
        first = await limits.charge(FAST, 1)
        for _ in range(2):
            await limits.charge(FAST, 1)
        await redis_client.zincrby("glimmer:rate:alice", -50_000, first.ticket)
        assert 5 <= int((await refusal(limits, FAST)).headers["retry-after"]) <= 10
        await redis_client.zincrby("glimmer:rate:alice", -10_000, first.ticket)
        await limits.charge(FAST, 1)
        await refusal(limits, FAST)
        assert await redis_client.zscore("glimmer:rate:alice", first.ticket) is None

    async def test_a_burst_gets_exactly_the_limit(self, limits: RateLimits) -> None:
        responses = await asyncio.gather(*(limits.charge(FAST, 1) for _ in range(30)), return_exceptions=True)
        assert sum(isinstance(response, ApiError) for response in responses) == 27

    async def test_callers_have_separate_limits(self, limits: RateLimits) -> None:
        for _ in range(3):
            await limits.charge(FAST, 1)
        await limits.charge(Caller("bob", requests_per_minute=1), 1)
        await refusal(limits, FAST)


class TestQuota:
    async def test_a_job_that_still_fits_is_accepted(self, limits: RateLimits) -> None:
        assert (await limits.charge(FRUGAL, 600)).headers == {}
        refused = await refusal(limits, FRUGAL, 401)
        assert (refused.type, refused.code) == ("insufficient_quota", "insufficient_quota")
        assert refused.headers == {"x-should-retry": "false"}
        for number in ("1000", "600", "401"):
            assert number in refused.message
        await limits.charge(FRUGAL, 400)
        await refusal(limits, FRUGAL, 1)

    async def test_yesterday_does_not_count(self, limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
        today = (await limits.charge(FRUGAL, 1)).day
        assert today == (await redis_client.time())[0] // 86_400
        await redis_client.set(f"glimmer:quota:alice:{today - 1}", 1000)
        await limits.charge(FRUGAL, 999)

    async def test_the_largest_numbers_are_exact(self, limits: RateLimits) -> None:
        caller = Caller("alice", pixel_steps_per_day=2**53 - 1)
        await limits.charge(caller, 2**53 - 2)
        await refusal(limits, caller, 2)
        await limits.charge(caller, 1)
        await refusal(limits, caller, 1)


async def test_a_refused_request_is_not_charged(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    await limits.charge(BOTH, 900)
    headers = (await refusal(limits, BOTH, 101)).headers
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert await used(redis_client) == (1, 900)
    await limits.charge(BOTH, 50)
    assert (await refusal(limits, BOTH)).code == "rate_limit_exceeded"
    assert await used(redis_client) == (2, 950)


async def test_a_refund_undoes_the_charge_and_no_more(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    await limits.charge(BOTH, 100)
    charge = await limits.charge(BOTH, 500)
    await limits.refund(charge)
    assert await used(redis_client) == (1, 100)
    await redis_client.flushdb()
    await limits.refund(charge)
    assert await redis_client.keys() == []
    await limits.charge(BOTH, 100)
    await limits.refund(charge)
    assert (await used(redis_client))[1] == 0


async def test_a_refund_takes_a_later_charge_back_too(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    charge = await limits.charge(BOTH, 100)
    await limits.top_up(charge, 500)
    assert await used(redis_client) == (1, 500)
    await limits.refund(charge)
    assert await used(redis_client) == (0, 0)


async def test_counts_expire(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    await limits.charge(BOTH, 1)
    left = [await redis_client.pttl(key) for key in sorted(await redis_client.keys())]
    assert 0 < left[0] <= 86_400_000
    assert 59_000 < left[1] <= 60_000
    assert await redis_client.ttl("glimmer:rate:alice") > 0


async def test_callers_without_limits_are_not_counted(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    for caller in (ANONYMOUS, Caller("alice", max_concurrent=1)):
        charge = await limits.charge(caller, 10**9)
        assert charge.headers == {}
        await limits.refund(charge)
    assert await redis_client.keys() == []


async def test_scripts_are_loaded_again_after_a_flush(limits: RateLimits, redis_client: redis.asyncio.Redis) -> None:
    charge = await limits.charge(BOTH, 1)
    await redis_client.script_flush()
    await limits.charge(BOTH, 1)
    await redis_client.script_flush()
    await limits.refund(charge)
    assert await used(redis_client) == (1, 1)


async def test_a_redis_without_memory_charges_everything_or_nothing(
    limits: RateLimits, redis_client: redis.asyncio.Redis
) -> None:
    await limits.charge(BOTH, 1)
    await redis_client.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailable):
            await limits.charge(BOTH, 1)
    finally:
        await redis_client.config_set("maxmemory", 0)
    assert await used(redis_client) == (1, 1)


@settings(max_examples=40, deadline=None)
@given(
    caller=st.sampled_from([FAST, FRUGAL, BOTH]),
    calls=st.lists(st.tuples(st.sampled_from(["charge", "refund"]), st.integers(0, 3), st.integers(1, 3)), max_size=12),
)
def test_repeated_commands_count_once(redis_server: EmbeddedRedis, caller: Caller, calls: list[tuple[str, int, int]]):
    """The Redis client sends a command again when its reply is lost."""

    async def run() -> None:
        client = connect(redis_server.url)
        await client.flushdb()
        scripts, arguments = RateLimits(JobQueue(client))._scripts, {"owner": "alice", "pixel_steps": 100}
        limits = {"per_minute": caller.requests_per_minute, "per_day": caller.pixel_steps_per_day}
        charged: dict[int, int] = {}  # day by ticket
        for call, number, repetitions in calls:
            if call == "charge" and number not in charged:
                replies = [
                    await scripts.run("charge", ticket=f"t{number}", **arguments, **limits) for _ in range(repetitions)
                ]
                assert {(reply[0], reply[1], reply[5]) for reply in replies} == {
                    (replies[0][0], replies[0][1], replies[0][5])
                }
                if replies[0][0] == b"":
                    charged[number] = replies[0][5]
            elif call == "refund" and number in charged:
                for _ in range(repetitions):
                    await scripts.run("refund", ticket=f"t{number}", day=charged[number], **arguments)
                charged[number] = 0
        live = sum(day > 0 for day in charged.values())
        requests, pixel_steps = await used(client)
        assert requests == (live if caller.requests_per_minute else 0)
        assert pixel_steps == (100 * live if caller.pixel_steps_per_day else 0)
        await client.flushdb()
        await client.aclose()

    asyncio.run(run())


class TestAdmission:
    async def test_a_job_refused_by_the_queue_is_refunded(
        self, queue: JobQueue, redis_client: redis.asyncio.Redis
    ) -> None:
        admission = Admission(queue, RateLimits(queue), 0, AbandonedJobs(queue, Metrics()))
        charge = await admission.charge(Caller("alice", None, 2, 10 * STEPS), SPEC)
        assert await used(redis_client) == (1, STEPS)
        with pytest.raises(ApiError, match="queue is full"):
            await admission.submit(SPEC, 9.0, "batch", charge)
        assert await used(redis_client) == (0, 0)

    async def test_concurrent_jobs(
        self, admission: Admission, queue: JobQueue, redis_client: redis.asyncio.Redis
    ) -> None:
        alice = Caller("alice", 2, 9, 100 * STEPS)
        jobs = [await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC)) for _ in range(2)]
        charge = await admission.charge(alice, SPEC)
        with pytest.raises(ApiError, match="2 jobs waiting and running") as refused:
            await admission.submit(SPEC, 9.0, "batch", charge)
        assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
        assert int(refused.value.headers["retry-after"]) >= 1
        assert await used(redis_client) == (2, 2 * STEPS)
        await admission.submit(SPEC, 9.0, "batch", await admission.charge(Caller("bob", 1), SPEC))
        await queue.cancel(jobs[0].job_id)
        await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC))

    async def test_a_repeated_request_is_not_charged(
        self, admission: Admission, redis_client: redis.asyncio.Redis
    ) -> None:
        alice, again = Caller("alice", 1, 5, 100 * STEPS), Idempotency("once", "f1")
        assert await admission.find_by_idempotency_key(alice, again) is None
        first = await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC), idempotency=again)
        assert not first.attached
        # Both when found before and when found by the submit, also at the limit of concurrent jobs.
        assert await admission.find_by_idempotency_key(alice, again) == first.job_id
        second = await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC), idempotency=again)
        assert (second.job_id, second.attached) == (first.job_id, True)
        assert await used(redis_client) == (1, STEPS)

    async def test_a_burst_of_one_key_is_one_job(self, admission: Admission, redis_client: redis.asyncio.Redis) -> None:
        alice, again = Caller("alice", None, 50, 100 * STEPS), Idempotency("once", "f1")

        async def post() -> str:
            charge = await admission.charge(alice, SPEC)
            return (await admission.submit(SPEC, 9.0, "batch", charge, idempotency=again)).job_id

        assert len(set(await asyncio.gather(*(post() for _ in range(20))))) == 1
        assert await used(redis_client) == (1, STEPS)

    async def test_a_key_with_another_request_is_refused(
        self, admission: Admission, redis_client: redis.asyncio.Redis
    ) -> None:
        alice = Caller("alice", None, 5, 100 * STEPS)
        await admission.submit(
            SPEC, 9.0, "batch", await admission.charge(alice, SPEC), idempotency=Idempotency("once", "f1")
        )
        other = Idempotency("once", "f2")
        with pytest.raises(ApiError, match="Idempotency-Key") as looked:
            await admission.find_by_idempotency_key(alice, other)
        charge = await admission.charge(alice, SPEC)
        with pytest.raises(ApiError, match="Idempotency-Key") as refused:
            await admission.submit(SPEC, 9.0, "batch", charge, idempotency=other)
        for error in (looked.value, refused.value):
            assert (error.status, error.code) == (422, "idempotency_key_reused")
        assert await used(redis_client) == (1, STEPS)
        # Equal keys of different callers are different keys.
        bob = Caller("bob")
        assert await admission.find_by_idempotency_key(bob, other) is None
        await admission.submit(SPEC, 9.0, "batch", await admission.charge(bob, SPEC), idempotency=other)

    @pytest.mark.parametrize("again", [None, Idempotency("once", "f1")])
    async def test_a_job_with_an_idempotency_key_is_not_discarded(
        self,
        queue: JobQueue,
        redis_client: redis.asyncio.Redis,
        monkeypatch: pytest.MonkeyPatch,
        again: Idempotency | None,
    ) -> None:
        """A discarded job is refunded, any other is charged once."""
        alice, submit = Caller("alice", None, 5, 100 * STEPS), queue.submit

        async def no_answer(*args: object, **kwargs: object) -> None:
            await submit(*args, **kwargs)  # type: ignore[arg-type]
            await asyncio.sleep(60)

        monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.5)
        abandoned_jobs = AbandonedJobs(queue, Metrics())
        admission = Admission(queue, RateLimits(queue), 100, abandoned_jobs)
        with monkeypatch.context() as patch:
            patch.setattr(queue, "submit", no_answer)
            with pytest.raises(QueueUnavailable):
                await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC), idempotency=again)
        await abandoned_jobs.close()
        assert (await queue.stats()).waiting == (0 if again is None else 1)
        assert await used(redis_client) == ((0, 0) if again is None else (1, STEPS))
        if again is not None:
            assert (
                await admission.submit(SPEC, 9.0, "batch", await admission.charge(alice, SPEC), idempotency=again)
            ).attached
            assert await used(redis_client) == (1, STEPS)

    async def test_a_job_that_may_be_queued_is_not_refunded(
        self, queue: JobQueue, redis_client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither its submit nor its discard gets a response; else an outage would make jobs free."""

        async def away(*_: object, **__: object) -> None:
            raise QueueUnavailable("planted")

        monkeypatch.setattr(abandoned_jobs_module, "REDIS_OUTAGE_TIMEOUT_S", 0)
        monkeypatch.setattr(queue, "submit", away)
        monkeypatch.setattr(queue, "discard", away)
        abandoned_jobs = AbandonedJobs(queue, Metrics())
        admission = Admission(queue, RateLimits(queue), 100, abandoned_jobs)
        charge = await admission.charge(Caller("alice", None, 5, 100 * STEPS), SPEC)
        with pytest.raises(QueueUnavailable):
            await admission.submit(SPEC, 9.0, "batch", charge)
        await abandoned_jobs.close()
        assert await used(redis_client) == (1, STEPS)


@asynccontextmanager
async def replica(url: str, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """Open another replica of the API with its own Redis client."""
    app = create_app(ServerSettings(redis_url=url, **settings))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", headers=bearer("a")) as client,
    ):
        yield client


async def test_replicas_share_the_limits(redis_server: EmbeddedRedis, stub: StubEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "a", requests_per_minute=2))
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(replica(redis_server.url, api_keys_file=path)) for _ in range(2)]
        responses = [await client.post(URL, json={"prompt": "x"}) for client in (one, two, one, two)]
        models = await one.get("/v1/models")
    assert [response.status_code for response in responses] == [200, 200, 429, 429]
    assert [response.headers["x-ratelimit-remaining-requests"] for response in responses] == ["1", "0", "0", "0"]
    assert {error_of(response)["code"] for response in responses[2:]} == {"rate_limit_exceeded"}
    assert models.status_code == 200  # only jobs are counted


async def test_the_headers_are_on_errors_after_the_charge(
    redis_server: EmbeddedRedis, stub: StubEngine, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "a", requests_per_minute=9))
    async with replica(redis_server.url, api_keys_file=path, max_queue=0) as client:
        full = await client.post(URL, json={"prompt": "x"})
        wrong = await client.post(URL, json={"prompt": ""})
    assert full.status_code == 429
    assert full.headers["x-ratelimit-limit-requests"] == "9"
    assert int(full.headers["retry-after"]) > 0
    assert "x-ratelimit-limit-requests" not in wrong.headers  # the request was not counted


async def test_without_redis_it_is_503(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", "a", requests_per_minute=9))
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        queue = JobQueue(client)
        async with replica(server.url, api_keys_file=path) as asking:
            async with StubEngine(queue):
                assert (await asking.post(URL, json={"prompt": "x"})).status_code == 200
                kill(server)
            # The list of engines is cached, so the charge is the first call to fail.
            response = await asking.post(URL, json={"prompt": "x"})
        await queue.close()
        await client.aclose()
    assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
    assert int(response.headers["retry-after"]) > 0


class TestOfficialSdk:
    @pytest.fixture
    async def server(self, queue: JobQueue, stub: StubEngine, tmp_path: Path) -> AsyncIterator[LiveServer]:
        path = tmp_path / "keys.toml"
        path.write_text(
            table("fast", "f", requests_per_minute=1)
            + table("frugal", "q", pixel_steps_per_day=1)
            + table("single", "s", max_concurrent=1)
        )
        server = LiveServer(queue, ServerSettings(api_keys_file=path))
        yield server
        await server.stop()

    def client(self, server: LiveServer, key: str, max_retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=max_retries)

    async def test_errors_have_their_classes_and_codes(self, server: LiveServer) -> None:
        async with self.client(server, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await client.images.generate(prompt="x")
        assert unknown.value.code == "invalid_api_key"
        async with self.client(server, "f") as client:
            response = await client.images.with_raw_response.generate(prompt="x")
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError) as fast:
                await client.images.generate(prompt="x")
        assert fast.value.code == "rate_limit_exceeded"
        assert int(fast.value.response.headers["retry-after"]) > 0

    async def test_an_exhausted_quota_is_not_retried(self, server: LiveServer) -> None:
        async with self.client(server, "q", max_retries=2) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.images.generate(prompt="x")
        assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert f'{{method="POST",route="{URL}",status="429"}} 1.0' in (await client.get("/metrics")).text

    async def test_one_concurrent_job(self, server: LiveServer, queue: JobQueue, stub: StubEngine) -> None:
        stub._step_s = 0.2
        async with self.client(server, "s") as client:
            first = asyncio.create_task(client.images.generate(prompt="x", extra_body={"num_inference_steps": 5}))
            await until(lambda: _busy(queue))
            with pytest.raises(openai.RateLimitError) as caught:
                await client.images.generate(prompt="x")
            assert (await first).data
            stub._step_s = 0.0
            assert (await client.images.generate(prompt="x")).data
        assert caught.value.code == "rate_limit_exceeded"


async def _busy(queue: JobQueue) -> bool:
    stats = await queue.stats()
    return stats.waiting + stats.running > 0


class TestMemory:
    """New jobs are refused before Redis is full: what is left is for those that run."""

    async def test_new_jobs_are_refused_above_the_high_water_mark(
        self, admission: Admission, queue: JobQueue, redis_client: redis.asyncio.Redis
    ) -> None:
        running = await admission.submit(SPEC, 9.0, "batch", NO_CHARGE)
        granted = await claim(queue)
        used_memory = (await redis_client.info("memory"))["used_memory"]
        await redis_client.config_set("maxmemory", int(used_memory / 0.9))
        admission.memory = RedisMemory(queue)
        try:
            with pytest.raises(ApiError, match="nearly out of memory") as refused:
                await admission.submit(SPEC, 9.0, "batch", NO_CHARGE)
            assert await queue.commit(granted, RESULT)
        finally:
            await redis_client.config_set("maxmemory", 0)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
        assert await queue.result(running.job_id) == RESULT

    async def test_a_key_that_keeps_its_half_is_refused_and_others_are_not(self, queue: JobQueue) -> None:
        admission = Admission(queue, RateLimits(queue), 100, AbandonedJobs(queue, Metrics()), max_result_bytes=120_000)

        async def fill(name: str) -> ApiError:
            submits = [admission.submit(SPEC, 9.0, "batch", Charge(Caller(name))) for _ in range(9)]
            ends = await asyncio.gather(*submits, return_exceptions=True)
            refused = [end for end in ends if isinstance(end, ApiError)]
            assert all(int(error.headers["retry-after"]) >= 1 for error in refused)
            return refused[0]

        first, second = await fill("alice"), await fill("bob")
        assert (first.status, second.status) == (429, 429)
        assert "one key may use" in first.message
        third = await fill("carol")
        assert third.status == 503
        assert "all the memory reserved" in third.message

    async def test_the_memory_is_read_once_for_many_requests(
        self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads, memory = 0, RedisMemory(queue)

        async def count() -> MemoryUse:
            nonlocal reads
            reads += 1
            return MemoryUse(0, 100)

        monkeypatch.setattr(queue, "memory_use", count)
        await asyncio.gather(*(memory.max_kept_bytes() for _ in range(100)))
        assert reads == 1
