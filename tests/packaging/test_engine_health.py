"""The engine container's health check, run as Docker runs it against a real queue."""

import asyncio
import os
import socket
import sys

import pytest

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import EngineInfo
from tests.job_queue import JobQueue
from tests.packaging.files import ROOT

SCRIPT = ROOT / "deploy" / "engine_health.py"
HERE = f"{socket.gethostname()}-7-0123abcd"


async def run_check(redis_url: str) -> tuple[int | None, str]:
    """Exit code, and what was printed."""
    environment = {**os.environ, "GLIMMER_REDIS_URL": redis_url}
    check = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, printed = await check.communicate()
    return check.returncode, printed.decode()


async def beat(queue: JobQueue, engine_id: str, state: str) -> None:
    info = EngineInfo(engine_id, 7, "all", state, "model", "256x256", 512, 2048)
    await queue.heartbeat(info, "", ttl_s=60)


@pytest.mark.parametrize("state", ["starting", "ready", "draining"])
async def test_an_engine_with_a_heartbeat_is_healthy(redis_server: EmbeddedRedis, queue: JobQueue, state: str) -> None:
    await beat(queue, HERE, state)
    assert await run_check(redis_server.url) == (0, "")


async def test_an_engine_that_hangs_is_not(redis_server: EmbeddedRedis, queue: JobQueue) -> None:
    await beat(queue, HERE, "stuck")
    code, printed = await run_check(redis_server.url)
    assert (code, "stuck" in printed) == (1, True)


async def test_the_heartbeat_of_another_container_does_not_count(redis_server: EmbeddedRedis, queue: JobQueue) -> None:
    await beat(queue, "another-7-0123abcd", "ready")
    code, printed = await run_check(redis_server.url)
    assert (code, "no heartbeat" in printed) == (1, True)


async def test_without_redis_it_says_so() -> None:
    code, printed = await run_check("unix:///nowhere/redis.sock")
    assert (code, "Redis" in printed, "Traceback" in printed) == (1, True, False)


async def test_the_ids_that_engines_choose_start_with_the_host_name() -> None:
    """What the check relies on; in a container the host name is the container's."""
    engine = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys, types, server.cli.commands\n"
        "worker = types.ModuleType('engine.worker.process')\n"
        "worker.main = lambda settings: print(settings.engine_id) or 0\n"
        "sys.modules['engine.worker.process'] = worker\n"
        "sys.argv = ['glimmer', 'engine', '--redis-url', 'redis://nowhere']\n"
        "server.cli.commands.main()\n",
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")},
    )
    printed, _ = await engine.communicate()
    assert printed.decode().startswith(f"{socket.gethostname()}-")
