"""`glimmer serve` as a process: it survives a dead engine and a dead Redis, and leaves no process behind."""

import asyncio
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import QueueStats
from engine.stop_signals import StopSignals
from server.processes import launch, redis_keeper, supervisor
from server.processes import serving as serving_module
from server.processes.backoff import Backoff
from server.processes.launch import EngineProcesses
from server.processes.serving import listen, url_of
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.jobs.helpers import kill
from tests.server.test_supervisor import FAKE_ENGINE, Starts, alive
from tests.waiting import until

URL = "/v1/images/generations"
SERVE = """
import sys
from pathlib import Path
from engine.observability import logs
from engine.stop_signals import StopSignals
from server.processes.launch import EngineProcesses, run_all
from server.settings import ServerSettings
logs.configure("info")
data_dir, *command = sys.argv[1:]
settings = ServerSettings(port=0, grace_s=5, api_key="k", drain_delay_s=0)
sys.exit(run_all(settings, EngineProcesses(1, Path(data_dir), command=command), StopSignals().install()))
"""


class Serving:
    """A running `serve`. `url` is known once it is ready."""

    def __init__(self, process: Process, starts: Starts):
        self.process, self.starts = process, starts
        self.url = ""

    async def ready(self) -> None:
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode()
        match = re.match(r"Glimmer is ready at (http://\S+) \(model stub", line)
        assert match, line
        self.url = match[1]

    async def end(self, seconds: float = 10.0) -> tuple[int, str]:
        """Return the exit code and stderr."""
        assert self.process.stderr is not None
        async with asyncio.timeout(seconds):
            log = (await self.process.stderr.read()).decode()
            return await self.process.wait(), log

    def children(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


@asynccontextmanager
async def serving(tmp_path: Path, mode: str, step_s: float = 0.0) -> AsyncIterator[Serving]:
    starts = Starts(tmp_path / "starts")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVE, str(tmp_path / "data"), sys.executable, FAKE_ENGINE, mode),
        env={**starts.environment, "FAKE_ENGINE_STEP_S": str(step_s)},
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield Serving(process, starts)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def client(serve: Serving) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=serve.url, headers={"authorization": "Bearer k"}, timeout=20)


async def test_sigterm_finishes_running_requests_and_leaves_no_process(tmp_path: Path) -> None:
    async with serving(tmp_path, "serve", step_s=3) as serve:  # longer than what /health says is old
        await serve.ready()
        children = serve.children()
        async with client(serve) as http:
            body = {"prompt": "secret-prompt", "num_inference_steps": 1}
            running = asyncio.create_task(http.post(URL, json=body))
            await until(lambda: _running(http, 1))
            serve.process.terminate()
            assert (await running).status_code == 200
        code, log = await serve.end()
        assert code == 0
        assert len(children) == 2  # the engine and Redis
        assert not any(alive(pid) for pid in children)
        assert "secret-prompt" not in log
        assert "route=/v1/images/generations status=200" in log
        assert serve.starts.lines()[0][-1] == "-"  # the engine did not get the key


async def test_the_stop_takes_one_grace_period_in_all(
    tmp_path: Path, redis_server: EmbeddedRedis, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a request nor the engine ends by itself."""
    monkeypatch.setattr(supervisor, "HAND_BACK_S", 1.0)
    monkeypatch.setattr(serving_module, "LAST_BYTES_S", 1)
    starts = Starts(tmp_path / "starts")
    environment = {"FAKE_ENGINE_LOG": str(starts.path), "FAKE_ENGINE_STEP_S": "60"}
    engines = EngineProcesses(1, tmp_path, environment=environment, command=[sys.executable, FAKE_ENGINE, "busy"])
    listener = listen("127.0.0.1", 0)
    settings = ServerSettings(grace_s=1.5, drain_delay_s=0)
    async with AsyncExitStack() as connections:
        stop = connections.enter_context(StopSignals())
        stop.attach()
        serve = asyncio.create_task(launch._serve(settings, engines, redis_server.url, listener, stop))
        http = await connections.enter_async_context(httpx.AsyncClient(base_url=url_of(listener), timeout=20))
        await until(lambda: _healthy(http), seconds=20)
        posted = asyncio.create_task(http.post(URL, json={"prompt": "x"}))
        await until(lambda: _running(http, 1))
        os.kill(os.getpid(), signal.SIGTERM)
        started = time.monotonic()
        assert await asyncio.wait_for(serve, 10) == 0
        assert 2.4 < time.monotonic() - started < 4.0
        await asyncio.wait([posted])
    assert not any(alive(pid) for pid in starts.pids())
    assert await queue.stats() == QueueStats(0, 0)  # the job of the disconnected client was cancelled


async def test_a_redis_that_restarts_slowly_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_keeper, "POLL_INTERVAL_S", 0.05)
    loading = tmp_path / "loading"
    loading.write_text("#!/bin/sh\nexec sleep 60\n")
    loading.chmod(0o755)
    with EmbeddedRedis(tmp_path / "data") as redis:
        binary, redis._binary = redis._binary, loading
        kill(redis)
        keeping = asyncio.create_task(redis_keeper.keep_alive(redis, Backoff(0.05)))
        await until(lambda: redis.alive)
        longest, last = 0.0, time.monotonic()
        for _ in range(50):
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 0.3
        assert redis.alive
        redis._binary = binary
        kill(redis)
        await until(redis.answers)
        keeping.cancel()
        await asyncio.wait([keeping])


async def test_a_redis_that_cannot_start_is_tried_less_and_less_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_keeper, "POLL_INTERVAL_S", 0.01)
    with EmbeddedRedis(tmp_path) as redis:
        kill(redis)
        (tmp_path / "appendonly.aof").write_bytes(b"garbage")
        keeping = asyncio.create_task(redis_keeper.keep_alive(redis, Backoff(0.02, 0.16)))
        await until(lambda: len(caplog.records) >= 6, seconds=10)
        keeping.cancel()
        await asyncio.wait([keeping])
    fields = [record.__dict__["fields"] for record in caplog.records]
    assert [event["restart_in_s"] for event in fields[:6]] == [0.0, 0.02, 0.04, 0.08, 0.16, 0.16]
    assert all("Bad file format" in event["reason"] and "--fix" in event["reason"] for event in fields[1:])


async def _running(http: httpx.AsyncClient, count: int) -> bool:
    return (await http.get("/health")).json()["queue"]["running"] == count


async def test_a_killed_engine_and_a_killed_redis_are_restarted(tmp_path: Path) -> None:
    async with serving(tmp_path, "serve") as serve:
        await serve.ready()
        engine_pid = serve.starts.pids()[0]
        redis_pid = next(pid for pid in serve.children() if pid != engine_pid)
        async with client(serve) as http:
            os.kill(engine_pid, signal.SIGKILL)
            await until(lambda: len(serve.starts.lines()) == 2)
            await until(lambda: _healthy(http), seconds=10)
            assert (await http.post(URL, json={"prompt": "x"})).status_code == 200
            os.kill(redis_pid, signal.SIGKILL)
            await until(lambda: not alive(redis_pid))
            await until(lambda: _generates(http), seconds=10)  # /health may be older than the kill


async def _generates(http: httpx.AsyncClient) -> bool:
    return (await http.post(URL, json={"prompt": "x"})).status_code == 200


async def _healthy(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health")).status_code == 200


async def test_a_killed_serve_leaves_no_process(tmp_path: Path) -> None:
    async with serving(tmp_path, "serve") as serve:
        await serve.ready()
        children = serve.children()
        serve.process.kill()
        await until(lambda: not any(alive(pid) for pid in children), seconds=5)


async def test_a_misconfigured_engine_stops_serve_with_its_message(tmp_path: Path) -> None:
    async with serving(tmp_path, "misconfigured") as serve:
        code, log = await serve.end()
    assert code == 2
    assert "no checkpoint there" in log
    assert len(serve.starts.lines()) == 1


async def test_a_taken_port_is_reported_before_anything_starts(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = url_of(taken).rsplit(":", 1)[1]
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "server.cli",
                "serve",
                "--port",
                port,
                "--data-dir",
                str(tmp_path / "data"),
            ),
            stderr=PIPE,
        )
        _, log = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert log.decode().startswith(f"glimmer: cannot listen on 127.0.0.1:{port}")
    assert b"Traceback" not in log
    assert not (tmp_path / "data").exists()
