"""How processes stop: what a first, a second and a third signal do, and what a drain still serves."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.results import ImageResult, JobResult
from engine.stop_signals import StopSignals
from server.processes import serving
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.jobs.helpers import claim, submit
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine
from tests.server.test_serve import serving as serve_process
from tests.waiting import until

URL = "/v1/images/generations"
SIZE = 8_000_000  # more than the kernel takes for a client that does not read
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# `glimmer engine` whose checkpoint loads for a minute, after a line that says so.
SLOW_ENGINE = """
import sys, time
from engine.worker import process
def load(settings):
    print("loading", flush=True)
    time.sleep(60)
process._load = load
from server.cli.commands import main
sys.argv = ["glimmer", "engine", "--redis-url", sys.argv[1]]
main()
"""


@asynccontextmanager
async def running(*command: str, **variables: str) -> AsyncIterator[Process]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command), env=environment | variables, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def first_line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode()


async def exit_code(process: Process, seconds: float = 10.0) -> int:
    return await asyncio.wait_for(process.wait(), seconds)


class TestSignals:
    @pytest.mark.parametrize("sig", SIGNALS)
    async def test_they_are_counted_and_the_first_two_are_announced(self, sig: signal.Signals) -> None:
        with StopSignals() as stop:
            os.kill(os.getpid(), sig)  # before the event loop listens
            stop.attach()
            await asyncio.wait_for(stop.draining.wait(), 5)
            assert (stop.hurried.is_set(), stop.interrupted) == (False, sig == signal.SIGINT)
            for _ in range(3):
                os.kill(os.getpid(), sig)
                await asyncio.wait_for(stop.hurried.wait(), 5)
            assert stop.count == 4

    async def test_an_ignored_signal_stays_ignored(self) -> None:
        """As by `nohup`."""
        previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.count == 0
        finally:
            signal.signal(signal.SIGHUP, previous)

    async def test_an_engine_that_loads_stops_in_order(self, redis_server: EmbeddedRedis) -> None:
        async with running("-c", SLOW_ENGINE, redis_server.url) as engine:
            assert await first_line(engine) == "loading\n"
            engine.send_signal(signal.SIGHUP)
            assert await exit_code(engine) == 0

    async def test_a_second_signal_ends_an_api_in_order(self, redis_server: EmbeddedRedis, queue: JobQueue) -> None:
        """Its waiting request is cut, and the job of that request does not run for nobody."""
        async with (
            StubEngine(queue, step_s=60),
            running("-m", "server.cli", "api", "--port", "0", "--redis-url", redis_server.url) as api,
        ):
            url = (await first_line(api)).split()[-1]
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                posted = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
                await until(lambda: _running_jobs(queue), seconds=20)
                api.send_signal(signal.SIGHUP)
                await until(lambda: _status(client, "/health", 503))
                api.send_signal(signal.SIGTERM)
                api.send_signal(signal.SIGTERM)
                assert await exit_code(api) == 0
                await asyncio.wait([posted])
        assert not await _running_jobs(queue)

    async def test_a_second_signal_makes_the_engines_of_serve_hand_back(self, tmp_path: Path) -> None:
        """Also when the API has nothing left to do, and its event loop nothing to wait for."""
        async with serve_process(tmp_path, "patient") as serve:
            await serve.ready()
            serve.process.send_signal(signal.SIGINT)
            await until(lambda: (tmp_path / "starts.signals").exists())
            serve.process.send_signal(signal.SIGHUP)
            await until(lambda: len((tmp_path / "starts.signals").read_text()) >= 2)
            for _ in range(3):
                serve.process.send_signal(signal.SIGTERM)
            code, log = await serve.end()
        assert code == 0
        assert "engines_killed" not in log


class TestDrain:
    async def test_requests_are_served_until_balancers_know(self, queue: JobQueue, stub: StubEngine) -> None:
        server = LiveServer(queue, ServerSettings(grace_s=20, drain_delay_s=1.5))
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            await until(lambda: _status(client, "/health", 200))
            server.server.drain(delayed=True)
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/live")).status_code == 200
            assert not await server.server.on_tick(1)
            served = await client.post(URL, json={"prompt": "x"})
            assert (served.status_code, served.headers["connection"]) == (200, "close")
            assert not server.task.done()
            await asyncio.wait_for(server.task, 5)
            with pytest.raises(httpx.ConnectError):
                await client.get("/live")

    async def test_the_delay_is_at_most_half_of_the_grace_period(self, queue: JobQueue) -> None:
        server = LiveServer(queue, ServerSettings(grace_s=0.2, drain_delay_s=3600))
        server.server.drain(delayed=True)
        await asyncio.wait_for(server.task, 5)

    async def test_ctrl_c_skips_the_delay(self, queue: JobQueue) -> None:
        server = LiveServer(queue, ServerSettings(grace_s=3600, drain_delay_s=1000))
        with StopSignals() as stop:
            stop.attach()
            following = asyncio.create_task(server.server.follow(stop))
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(server.task, 5)
            following.cancel()

    async def test_an_answer_to_a_slow_reader_is_sent_to_its_end(
        self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes longer than the seconds for last bytes; the kernel's buffers hold a part of it only."""
        monkeypatch.setattr(serving, "LAST_BYTES_S", 0.1)
        server = LiveServer(queue, ServerSettings(grace_s=20))
        await _finish_large_job(queue, SIZE)
        with socket.create_connection(server.address) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, b"GET /v1/jobs/large HTTP/1.1\r\nhost: x\r\n\r\n")
            received = await loop.sock_recv(client, 1000)
            server.server.drain()
            for _ in range(4):
                await asyncio.sleep(0.25)
                received += await loop.sock_recv(client, 200_000)
            assert not server.task.done()
            while chunk := await loop.sock_recv(client, 2**20):
                received += chunk
        assert len(received) > SIZE * 4 / 3  # base64
        await asyncio.wait_for(server.task, 5)

    async def test_bytes_that_no_request_waits_for_are_sent(
        self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unsent = [1]
        monkeypatch.setattr(serving.DrainingServer, "_has_unsent_bytes", lambda _: bool(unsent))
        server = LiveServer(queue, ServerSettings(grace_s=60, drain_delay_s=0))
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.get("/live")).status_code == 200
        server.server.drain()
        await asyncio.sleep(1)
        assert not server.task.done()
        unsent.clear()
        await asyncio.wait_for(server.task, 30)

    async def test_a_reader_that_never_reads_ends_with_the_grace_period(
        self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "LAST_BYTES_S", 0.1)
        server = LiveServer(queue, ServerSettings(grace_s=0.3))
        await _finish_large_job(queue, SIZE)
        with socket.create_connection(server.address) as client:
            client.sendall(b"GET /v1/jobs/large HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.to_thread(client.recv, 100)
            server.server.drain()
            await asyncio.wait_for(server.task, 5)


async def _finish_large_job(queue: JobQueue, size: int) -> None:
    """Finish a job called `large` with an image of `size` bytes."""
    await submit(queue, job_id="large")
    result = JobResult([ImageResult(os.urandom(size), seed=7)], prompt_tokens=5, plan_tokens=260)
    assert await queue.commit(await claim(queue), result)


async def _running_jobs(queue: JobQueue) -> int:
    return (await queue.stats()).running


async def _status(client: httpx.AsyncClient, path: str, status: int) -> bool:
    return (await client.get(path)).status_code == status
