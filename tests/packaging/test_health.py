"""`glimmer health`, run as Docker runs it: against an HTTP server and against a real queue."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import EngineInfo
from tests.job_queue import JobQueue

PRINT_ENGINE_ID = """
import sys, types, server.cli.commands
worker = types.ModuleType('engine.worker.process')
worker.main = lambda settings: print(settings.engine_id) or 0
sys.modules['engine.worker.process'] = worker
sys.argv = ['glimmer', 'engine', '--redis-url', 'redis://nowhere']
server.cli.commands.main()
"""
PRINT_SLOW_IMPORTS = """
import sys, server.cli.commands
print([name for name in ("torch", "fastapi", "httpx", "redis") if name in sys.modules])
"""
THIS_HOST = f"{socket.gethostname()}-7-0123abcd"


async def health(*arguments: str, **environment: str) -> tuple[int | None, str]:
    """Return the exit code and what was written to stderr."""
    check = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server.cli", "health", *arguments),
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    _, printed = await check.communicate()
    return check.returncode, printed.decode()


class TestEngine:
    @pytest.mark.parametrize("state", ["starting", "ready", "draining"])
    async def test_an_engine_with_a_heartbeat_is_healthy(
        self, redis_server: EmbeddedRedis, queue: JobQueue, state: str
    ) -> None:
        await beat(queue, THIS_HOST, state)
        assert await check_engine(redis_server) == (0, "")

    async def test_an_engine_that_hangs_is_not(self, redis_server: EmbeddedRedis, queue: JobQueue) -> None:
        await beat(queue, THIS_HOST, "stuck")
        assert await check_engine(redis_server) == (1, "glimmer: the engine is stuck\n")

    async def test_the_heartbeat_of_another_container_does_not_count(
        self, redis_server: EmbeddedRedis, queue: JobQueue
    ) -> None:
        await beat(queue, "another-7-0123abcd", "ready")
        assert await check_engine(redis_server) == (1, "glimmer: no heartbeat from an engine of this host\n")

    async def test_an_engine_can_be_named(self, redis_server: EmbeddedRedis, queue: JobQueue) -> None:
        await beat(queue, THIS_HOST, "stuck")
        await beat(queue, "named", "ready")
        assert await check_engine(redis_server, "named") == (0, "")
        assert await check_engine(redis_server, GLIMMER_ENGINE_ID="named") == (0, "")
        assert await check_engine(redis_server, "name") == (1, "glimmer: no heartbeat from engine name\n")

    async def test_an_unreachable_redis_is_reported(self) -> None:
        code, printed = await health("--engine", GLIMMER_REDIS_URL="unix:///nowhere/redis.sock")
        assert (code, "Redis" in printed, printed.count("\n")) == (1, True, 1)
        code, printed = await health("--engine", GLIMMER_REDIS_URL="")
        assert (code, "GLIMMER_REDIS_URL" in printed, printed.count("\n")) == (1, True, 1)

    async def test_generated_ids_start_with_the_host_name(self) -> None:
        """The check relies on it; in a container the host name is the container's."""
        engine = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PRINT_ENGINE_ID),
            stdout=asyncio.subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")},
        )
        printed, _ = await engine.communicate()
        assert printed.decode().startswith(f"{socket.gethostname()}-")


class TestApi:
    async def test_an_api_that_answers_is_healthy(self) -> None:
        async with answering(200, "{}") as port:
            assert await health(GLIMMER_PORT=port, GLIMMER_HOST="0.0.0.0", HTTP_PROXY="http://127.0.0.1:9") == (0, "")
            assert await health("--port", port, "--ready") == (0, "")

    async def test_another_status_is_reported_with_its_reason(self) -> None:
        async with answering(503, '{"status": "unavailable", "reason": "no engine is ready"}') as port:
            line = "glimmer: GET /health answered 503 (no engine is ready)\n"
            assert await health("--port", port, "--ready") == (1, line)
        async with answering(404, "<html>") as port:
            assert await health("--port", port) == (1, "glimmer: GET /live answered 404\n")

    async def test_an_api_that_does_not_answer_is_reported(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            free = str(listener.getsockname()[1])
        code, printed = await health("--port", free)
        assert (code, printed.startswith("glimmer: GET /live failed: "), printed.count("\n")) == (1, True, 1)


async def test_the_command_starts_without_slow_imports() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PRINT_SLOW_IMPORTS), stdout=asyncio.subprocess.PIPE
    )
    assert (await process.communicate())[0] == b"[]\n"


async def check_engine(redis_server: EmbeddedRedis, *arguments: str, **environment: str) -> tuple[int | None, str]:
    return await health("--engine", *arguments, GLIMMER_REDIS_URL=redis_server.url, **environment)


async def beat(queue: JobQueue, engine_id: str, state: str) -> None:
    info = EngineInfo(engine_id, 7, "all", state, "model", "256x256", 512, 2048)
    await queue.heartbeat(info, "", ttl_s=60)


@asynccontextmanager
async def answering(status: int, body: str) -> AsyncIterator[str]:
    """Yield the port of a server that answers every request so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield str(server.sockets[0].getsockname()[1])
