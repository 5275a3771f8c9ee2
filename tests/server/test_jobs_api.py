"""Asynchronous jobs, idempotency keys, and images by URL."""

import asyncio
import base64
from typing import Any

import httpx
import jsonschema
import pytest
import redis.asyncio

from engine.errors import QueueUnavailable
from engine.jobs.job import JobError
from server.routes import images
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer, MakeClient
from tests.server.events import events_of
from tests.server.stub_engine import StubEngine, partial_image, stub_image
from tests.server.test_edits import IMAGE, upload
from tests.server.test_errors import error_of
from tests.waiting import until

URL, EDITS = "/v1/images/generations", "/v1/images/edits"
ASYNC = {"prefer": "respond-async"}


def key(value: str) -> dict[str, str]:
    return {"idempotency-key": value}


async def submitted(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> str:
    """Submit a job and return its id."""
    response = await client.post(URL, json={"prompt": "x", **fields}, headers={**ASYNC, **(headers or {})})
    assert response.status_code == 202, response.text
    return response.json()["id"]


async def ended(client: httpx.AsyncClient, job_id: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Wait until the job has ended and return it."""
    job: dict[str, Any] = {}

    async def has_ended() -> bool:
        nonlocal job
        job = (await client.get(f"/v1/jobs/{job_id}", headers=headers)).json()
        return job["status"] not in ("queued", "running")

    await until(has_ended, seconds=30)
    return job


async def _unavailable(*_: Any, **__: Any) -> None:
    raise QueueUnavailable("planted")


async def _waiting(queue: JobQueue, count: int) -> bool:
    return (await queue.stats()).waiting == count


async def _running(queue: JobQueue, count: int) -> bool:
    return (await queue.stats()).running == count


class TestJobs:
    async def test_a_job_whose_id_cannot_be_returned_is_discarded(
        self, client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The client never learns its id. With an idempotency key it can, by repeating the request."""
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        monkeypatch.setattr(images, "render_job", _unavailable)
        response = await client.post(URL, json={"prompt": "x"}, headers=ASYNC)
        assert (response.status_code, error_of(response)["code"]) == (503, "service_unavailable")
        await until(lambda: _waiting(queue, 0))
        response = await client.post(URL, json={"prompt": "x"}, headers=ASYNC | key("once"))
        assert (response.status_code, error_of(response)["code"]) == (503, "service_unavailable")
        monkeypatch.undo()
        assert await _waiting(queue, 1)
        assert await submitted(client, key("once"))
        assert await _waiting(queue, 1)

    async def test_from_submit_to_result(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        fields = {"prompt": "a fox", "seed": 3, "n": 2, "size": "128x64", "timeout": 60}
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        response = await client.post(URL, json=fields, headers=ASYNC)
        assert response.status_code == 202
        assert response.headers["preference-applied"] == "respond-async"
        job = response.json()
        assert response.headers["location"] == f"http://t/v1/jobs/{job['id']}"
        created = job.pop("created_at")
        assert job == {
            "id": job["id"],
            "object": "image.job",
            "operation": "generation",
            "status": "queued",
            "deadline": created + 60,
            "position": 0,
            "estimated_seconds": None,
            "progress": None,
            "result": None,
            "error": None,
        }
        async with StubEngine(queue):
            done = await ended(client, job["id"])
            direct = (await client.post(URL, json=fields)).json()
        assert (done["status"], done["position"], done["error"]) == ("succeeded", None, None)
        assert done["result"].pop("created") <= direct.pop("created")
        assert done["result"] == direct
        assert (await client.get(response.headers["location"])).json()["result"]["data"] == direct["data"]

    async def test_a_result_stays_after_it_was_fetched(
        self, client: httpx.AsyncClient, stub: StubEngine, redis_client: redis.asyncio.Redis
    ) -> None:
        await ended(client, await submitted(client))
        await asyncio.sleep(0.2)
        [result] = await redis_client.keys("glimmer:result:*")
        assert await redis_client.pttl(result) > 500_000

    async def test_edits(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        response = await client.post(EDITS, data={"prompt": "x"}, files=upload(("image", IMAGE)), headers=ASYNC)
        assert (response.status_code, response.json()["operation"]) == (202, "edit")
        done = await ended(client, response.json()["id"])
        data = base64.b64decode(done["result"]["data"][0]["b64_json"])
        assert data == stub_image(stub.specs[0], stub.specs[0].seed, stub.sources[0])

    @pytest.mark.parametrize("prefer", ["respond-async, wait=10", "wait=10;x, Respond-Async", "respond-async;foo=1"])
    async def test_forms_of_the_prefer_header(self, client: httpx.AsyncClient, stub: StubEngine, prefer: str) -> None:
        response = await client.post(URL, json={"prompt": "x"}, headers={"prefer": prefer})
        assert response.status_code == 202

    async def test_other_preferences_change_nothing(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        response = await client.post(URL, json={"prompt": "x"}, headers={"prefer": "return=minimal, respond-asynch"})
        assert response.status_code == 200

    async def test_invalid_requests_are_refused_at_once(self, make_client: MakeClient, queue: JobQueue) -> None:
        async with make_client() as client:
            assert (await client.post(URL, json={"prompt": "x", "n": 0}, headers=ASYNC)).status_code == 400
            assert (await client.post(URL, json={"prompt": "x"}, headers=ASYNC)).status_code == 503
        async with make_client(max_queue=1) as client:
            await queue.heartbeat(StubEngine(queue).info, "", 10)
            await submitted(client)
            assert (await client.post(URL, json={"prompt": "x"}, headers=ASYNC)).status_code == 429

    async def test_position_and_estimate(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=0.2):
            await ended(client, await submitted(client, num_inference_steps=1))
            await until(lambda: _counted(client, "succeeded"))
        async with StubEngine(queue, step_s=60, slots=1):
            ids = [await submitted(client) for _ in range(4)]
            await until(lambda: _waiting(queue, 3))
            jobs = [(await client.get(f"/v1/jobs/{job_id}")).json() for job_id in ids]
        assert [job["status"] for job in jobs] == ["running", "queued", "queued", "queued"]
        assert [job["position"] for job in jobs] == [None, 0, 1, 2]
        first, second, third = (job["estimated_seconds"] for job in jobs[1:])
        assert first >= 0.2
        assert (second, third) == (pytest.approx(2 * first, abs=0.2), pytest.approx(3 * first, abs=0.3))
        assert jobs[0]["estimated_seconds"] is None

    async def test_cancelling(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=60, slots=1):
            running, waiting = [await submitted(client) for _ in range(2)]
            await until(lambda: _running(queue, 1))
            for job_id in (waiting, running, running):
                job = (await client.delete(f"/v1/jobs/{job_id}")).json()
                assert (job["id"], job["status"], job["error"]["code"]) == (job_id, "cancelled", "job_cancelled")
            await until(lambda: _running(queue, 0))

    async def test_cancelling_an_ended_job_changes_nothing(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        job = await ended(client, await submitted(client))
        assert (await client.delete(f"/v1/jobs/{job['id']}")).json() == job

    async def test_failures(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        error = {"message": "No.", "type": "invalid_request_error", "code": "invalid_value", "param": "prompt"}
        stub.failures = {"bad": JobError(**error)}
        job = await ended(client, await submitted(client, prompt="bad"))
        assert (job["status"], job["error"], job["result"]) == ("failed", error, None)

    async def test_the_deadline_needs_no_engine(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        job = await ended(client, await submitted(client, timeout=0.2))
        assert (job["status"], job["error"]["code"]) == ("expired", "deadline_exceeded")

    async def test_a_job_goes_on_without_its_client(self, live_server: LiveServer, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=0.3):
            async with httpx.AsyncClient(base_url=live_server.url, timeout=60) as client:
                job_id = await submitted(client, num_inference_steps=1)
            async with httpx.AsyncClient(base_url=live_server.url, timeout=60) as client:
                assert (await ended(client, job_id))["status"] == "succeeded"

    async def test_ends_are_counted(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        await submitted(client)
        await until(lambda: _counted(client, "succeeded"))

    async def test_a_forgotten_job_expires_and_is_counted(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        await queue.heartbeat(StubEngine(queue).info, "", 10)  # ready, but claims nothing
        await submitted(client, timeout=0.2)
        await until(lambda: _counted(client, "expired"))
        assert (await queue.stats()).waiting == 0

    async def test_an_unknown_job(self, client: httpx.AsyncClient) -> None:
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            response = await client.request(method, f"/v1/jobs/job_none{path}")
            assert (response.status_code, error_of(response)["code"]) == (404, "job_not_found")

    async def test_another_caller_s_job(self, make_client: MakeClient, stub: StubEngine, queue: JobQueue) -> None:
        mine = {"authorization": "Bearer mine"}
        async with make_client(api_key="mine") as client, make_client() as other:
            job_id = await submitted(client, mine)
            assert (await ended(client, job_id, mine))["status"] == "succeeded"
            assert (await client.get(f"/v1/jobs/{job_id}")).status_code == 401
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
                response = await other.request(method, f"/v1/jobs/{job_id}{path}")
                assert (response.status_code, error_of(response)["code"]) == (404, "job_not_found")

    async def test_redis_away(
        self, client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.redis_timeout.REDIS_TIMEOUT_S", 0.1)
        monkeypatch.setattr(queue, "get", lambda _: asyncio.sleep(60))
        assert (await client.get("/v1/jobs/a")).status_code == 503
        assert (await client.get("/v1/jobs/a/events")).status_code == 503


async def _counted(client: httpx.AsyncClient, state: str) -> bool:
    return f'glimmer_api_jobs_total{{state="{state}"}} 1.0' in (await client.get("/metrics")).text


class TestJobEvents:
    async def test_events_from_queue_to_end(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        fields = {"num_inference_steps": 8, "partial_images": 2, "seed": 1, "return_plan": True}
        await queue.heartbeat(StubEngine(queue).info, "", 10)
        job_id = await submitted(client, **fields)
        following = asyncio.create_task(client.get(f"/v1/jobs/{job_id}/events"))
        await asyncio.sleep(0.3)
        async with StubEngine(queue, step_s=0.1) as stub:
            events = events_of(await following)
            job = (await client.get(f"/v1/jobs/{job_id}")).json()
        assert [data["status"] for data in events.of("status")] == ["queued", "running"]
        assert {"phase": "rendering", "step": 1, "steps": 8} in events.of("progress")
        partials = events.of("partial_image")
        shown = [partial_image(stub.specs[0], 0, index) for index in (0, 1)]
        assert [base64.b64decode(data["b64_json"]) for data in partials] == [partial.data for partial in shown]
        assert [data["plan"] for data in partials] == [partial.grid for partial in shown]
        assert events.names[-1] == "completed"
        assert events.of("completed") == [job]

    async def test_events_after_the_end(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        job_id = await submitted(client, partial_images=2)
        job = await ended(client, job_id)
        for _ in range(2):
            events = events_of(await client.get(f"/v1/jobs/{job_id}/events"))
            assert events.names == ["partial_image", "partial_image", "completed"]
            assert events.of("completed") == [job]

    async def test_failures(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=60):
            job_id = await submitted(client)
            following = asyncio.create_task(client.get(f"/v1/jobs/{job_id}/events"))
            await until(lambda: _running(queue, 1))
            await client.delete(f"/v1/jobs/{job_id}")
            events = events_of(await following)
        assert events.names[-1] == "failed"
        assert events.named[-1][1]["error"]["code"] == "job_cancelled"

    async def test_a_follower_may_disconnect(self, live_server: LiveServer, queue: JobQueue) -> None:
        async with (
            StubEngine(queue, step_s=0.5),
            httpx.AsyncClient(base_url=live_server.url, timeout=60) as client,
        ):
            job_id = await submitted(client, num_inference_steps=1)
            async with client.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                assert response.status_code == 200
            assert (await ended(client, job_id))["status"] == "succeeded"


class TestIdempotency:
    async def test_twenty_posts_are_one_job(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=0.3) as stub:
            posts = [
                client.post(URL, json={"prompt": "x", "num_inference_steps": 1}, headers=key("k")) for _ in range(20)
            ]
            responses = await asyncio.gather(*posts)
        assert {response.status_code for response in responses} == {200}
        assert len({response.content for response in responses}) == 1
        assert len(stub.specs) == 1
        assert 'glimmer_api_jobs_total{state="succeeded"} 1.0' in (await client.get("/metrics")).text

    async def test_a_repetition_gets_the_same_response(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        first = await client.post(URL, json={"prompt": "x", "n": None}, headers=key("k"))
        again = await client.post(URL, json={"n": 1, "prompt": "x"}, headers=key("k"))
        other = await client.post(URL, json={"prompt": "x"}, headers=key("l"))
        assert first.content == again.content != other.content
        assert len(stub.specs) == 2

    async def test_a_repetition_needs_no_engine(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue):
            first = await client.post(URL, json={"prompt": "x"}, headers=key("k"))
        await queue.deregister("stub-engine")
        await asyncio.sleep(1.1)
        assert (await client.post(URL, json={"prompt": "y"})).status_code == 503
        again = await client.post(URL, json={"prompt": "x"}, headers=key("k"))
        assert (again.status_code, again.content) == (200, first.content)

    async def test_every_kind_of_response_finds_the_job(self, client: httpx.AsyncClient, queue: JobQueue) -> None:
        async with StubEngine(queue, step_s=0.5) as stub:
            fields = {"prompt": "x", "num_inference_steps": 1}
            waiting = asyncio.create_task(client.post(URL, json=fields, headers=key("k")))
            await until(lambda: _running(queue, 1))
            job = (await client.post(URL, json=fields, headers={**key("k"), **ASYNC})).json()
            done = await ended(client, job["id"])
            assert done["result"] == (await waiting).json()
            repeated = await client.post(URL, json=fields, headers={**key("k"), **ASYNC})
            assert (repeated.status_code, repeated.json()) == (202, done)
        assert len(stub.specs) == 1

    async def test_streams(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        fields = {"prompt": "x", "stream": True, "partial_images": 1}
        first, again = [events_of(await client.post(URL, json=fields, headers=key("k"))) for _ in range(2)]
        assert first.names == again.names == ["image_generation.partial_image", "image_generation.completed"]
        assert first.named[-1][1]["b64_json"] == again.named[-1][1]["b64_json"]
        assert len(stub.specs) == 1

    async def test_edits(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        encoded = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"
        form = await client.post(EDITS, data={"prompt": "x"}, files=upload(("image", IMAGE)), headers=key("k"))
        json = await client.post(EDITS, json={"prompt": "x", "image": encoded}, headers=key("k"))
        other = await client.post(EDITS, data={"prompt": "x"}, files=upload(("image", IMAGE + b"x")), headers=key("k"))
        generation = await client.post(URL, json={"prompt": "x"}, headers=key("k"))
        assert form.content == json.content
        assert [other.status_code, generation.status_code] == [422, 422]
        assert len(stub.specs) == 1

    async def test_another_body_is_refused(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        await client.post(URL, json={"prompt": "x"}, headers=key("k"))
        response = await client.post(URL, json={"prompt": "y"}, headers=key("k"))
        assert (response.status_code, error_of(response)["code"]) == (422, "idempotency_key_reused")

    async def test_a_failed_job_can_be_repeated(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        stub.failures = {"x": JobError("Out of memory.", code="out_of_memory")}
        assert (await client.post(URL, json={"prompt": "x"}, headers=key("k"))).status_code == 500
        stub.failures = {}
        assert (await client.post(URL, json={"prompt": "x"}, headers=key("k"))).status_code == 200

    @pytest.mark.parametrize("value", [b"", b"a" * 256, b"a\tb", b"\xe9"])
    async def test_invalid_keys(self, client: httpx.AsyncClient, stub: StubEngine, value: bytes) -> None:
        response = await client.post(URL, json={"prompt": "x"}, headers={b"idempotency-key": value})
        assert (response.status_code, error_of(response)["param"]) == (400, "Idempotency-Key")

    async def test_a_client_that_disconnects_leaves_the_job_to_others(
        self, live_server: LiveServer, queue: JobQueue
    ) -> None:
        fields = {"prompt": "x", "num_inference_steps": 1}
        async with StubEngine(queue, step_s=1) as stub, httpx.AsyncClient(base_url=live_server.url) as client:
            leaving = asyncio.create_task(client.post(URL, json=fields, headers=key("k"), timeout=60))
            await until(lambda: _running(queue, 1))
            leaving.cancel()
            await asyncio.wait([leaving])
            response = await client.post(URL, json=fields, headers=key("k"), timeout=60)
            assert response.status_code == 200
        assert len(stub.specs) == 1


class TestUrls:
    async def test_an_image_by_its_url(self, client: httpx.AsyncClient, stub: StubEngine) -> None:
        fields = {"prompt": "x", "seed": 1, "n": 2, "response_format": "url"}
        data = (await client.post(URL, json=fields)).json()["data"]
        assert [set(image) for image in data] == [{"url", "seed"}] * 2
        for image in data:
            assert image["url"].startswith("http://t/v1/files/")
            assert image["url"].endswith(".png")
            assert len(image["url"].rsplit("/", 1)[1]) >= 36
            file = await client.get(image["url"])
            assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
            assert file.headers["cache-control"] == "private, max-age=600, immutable"
            assert file.content == stub_image(stub.specs[0], image["seed"])
        assert data[0]["url"] != data[1]["url"]

    @pytest.mark.parametrize("output_format", ["jpeg", "webp"])
    async def test_other_formats(self, client: httpx.AsyncClient, stub: StubEngine, output_format: str) -> None:
        fields = {"prompt": "x", "response_format": "url", "output_format": output_format}
        [image] = (await client.post(URL, json=fields)).json()["data"]
        assert image["url"].endswith(f".{output_format}")
        assert (await client.get(image["url"])).headers["content-type"] == f"image/{output_format}"

    async def test_neither_key_nor_job_is_needed(
        self, make_client: MakeClient, stub: StubEngine, queue: JobQueue
    ) -> None:
        headers = {"authorization": "Bearer k"}
        async with make_client(api_key="k") as client:
            response = await client.post(URL, json={"prompt": "x", "response_format": "url"}, headers=headers)
            [image] = response.json()["data"]
        async with make_client(api_key="k") as replica:
            assert (await replica.get(image["url"])).status_code == 200

    async def test_files_expire(
        self, client: httpx.AsyncClient, stub: StubEngine, redis_client: redis.asyncio.Redis
    ) -> None:
        [image] = (await client.post(URL, json={"prompt": "x", "response_format": "url"})).json()["data"]
        [stored] = await redis_client.keys("glimmer:file:*")
        assert 590_000 < await redis_client.pttl(stored) <= 600_000
        await redis_client.pexpire(stored, 1)
        await asyncio.sleep(0.05)
        response = await client.get(image["url"])
        assert (response.status_code, error_of(response)["code"]) == (404, "file_not_found")

    async def test_jobs_and_repetitions_give_the_same_urls(
        self, client: httpx.AsyncClient, stub: StubEngine, redis_client: redis.asyncio.Redis
    ) -> None:
        fields = {"prompt": "x", "response_format": "url"}
        responses = [await client.post(URL, json=fields, headers=key("k")) for _ in range(2)]
        job = (await client.post(URL, json=fields, headers={**key("k"), **ASYNC})).json()
        assert responses[0].json() == responses[1].json() == job["result"] == (await ended(client, job["id"]))["result"]
        assert len(await redis_client.keys("glimmer:file:*")) == 1

    async def test_the_server_s_default_and_its_public_url(self, make_client: MakeClient, stub: StubEngine) -> None:
        settings = {"default_response_format": "url", "public_url": "https://images.example.org/api/"}
        async with make_client(**settings) as client:
            [image] = (await client.post(URL, json={"prompt": "x"})).json()["data"]
            [encoded] = (await client.post(URL, json={"prompt": "x", "response_format": "b64_json"})).json()["data"]
            job = await client.post(URL, json={"prompt": "x"}, headers=ASYNC)
        assert image["url"].startswith("https://images.example.org/api/v1/files/")
        assert "url" not in encoded
        assert job.headers["location"].startswith("https://images.example.org/api/v1/jobs/job_")

    async def test_the_url_the_client_used(self, queue: JobQueue, stub: StubEngine) -> None:
        server = LiveServer(queue, ServerSettings())
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            [image] = (await client.post(URL, json={"prompt": "x", "response_format": "url"})).json()["data"]
            assert image["url"].startswith(f"{server.url}/v1/files/")
            assert (await client.get(image["url"])).status_code == 200
        await server.stop()

    @pytest.mark.parametrize("name", ["nothing", "nothing.png", ".png", "%00", "a" * 5000])
    async def test_unknown_files(self, client: httpx.AsyncClient, name: str) -> None:
        assert (await client.get(f"/v1/files/{name}")).status_code == 404


async def test_responses_match_the_document(client: httpx.AsyncClient, queue: JobQueue) -> None:
    document = (await client.get("/openapi.json")).json()

    def check(body: object, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(body, schema)

    async with StubEngine(queue, step_s=0.1) as stub:
        stub.failures = {"bad": JobError("No.", "invalid_request_error", "invalid_value", "prompt")}
        queued = await client.post(URL, json={"prompt": "x", "num_inference_steps": 3}, headers=ASYNC)
        check(queued.json(), "JobBody")
        check(await ended(client, queued.json()["id"]), "JobBody")
        check(await ended(client, await submitted(client, prompt="bad", num_inference_steps=1)), "JobBody")
        check((await client.post(URL, json={"prompt": "x", "num_inference_steps": 1})).json(), "ImagesBody")
        check((await client.get("/v1/jobs/none")).json(), "ErrorBody")
