"""`glimmer health`, run as Docker runs it: against an HTTP server and against the files of engines."""

import asyncio
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.worker.status import MAX_AGE_S, EngineState, EngineStatus, read_statuses, status_folder
from tests.waiting import until

PRINT_ENGINE_ID = """
import sys, types, server.cli.commands
worker = types.ModuleType('engine.worker.process')
worker.main = lambda settings, stop: print(settings.engine_id) or 0
sys.modules['engine.worker.process'] = worker
sys.argv = ['glimmer', 'engine', '--redis-url', 'redis://nowhere']
server.cli.commands.main()
"""
PRINT_SLOW_IMPORTS = """
import sys, server.cli.commands
print([name for name in ("torch", "fastapi", "httpx", "redis") if name in sys.modules])
"""


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
    """The files of engines, which are this process here; its private temporary folder stands for a container's."""

    @pytest.fixture(autouse=True)
    def _temporary_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path))

    @pytest.mark.parametrize("state", ["starting", "ready", "draining"])
    async def test_an_engine_that_writes_is_healthy_without_redis(self, state: EngineState) -> None:
        write("engine-1", state)
        assert await health("--engine", GLIMMER_REDIS_URL="unix:///nowhere/redis.sock") == (0, "")
        assert await health("--engine", "--redis-url", "redis://nowhere") == (0, "")  # of older health checks

    @pytest.mark.parametrize("state", ["starting", "ready", "draining"])
    async def test_an_engine_is_ready_only_while_it_takes_jobs(self, state: EngineState) -> None:
        write("engine-1", state)
        expected = (0, "") if state == "ready" else (1, f"glimmer: engine engine-1 is {state}\n")
        assert await health("--engine", "--ready") == expected

    async def test_an_engine_that_hangs_is_not(self) -> None:
        write("engine-1", "stuck")
        assert await health("--engine") == (
            1,
            "glimmer: engine engine-1 is stuck: its device does not return from a step\n",
        )

    async def test_an_event_loop_that_hangs_is_noticed(self) -> None:
        """Its file grows old, its process is there."""
        write("engine-1", "ready", age_s=MAX_AGE_S + 1)
        code, printed = await health("--engine")
        assert (code, "engine-1 has not moved for" in printed) == (1, True)

    async def test_the_file_of_a_dead_engine_does_not_count(self, tmp_path: Path) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
        await process.wait()
        for pid, born in ((process.pid, "1"), (os.getpid(), "1")):  # gone, and a later process with its number
            write("engine-1", "ready", pid=pid, born=born)
            code, printed = await health("--engine")
            assert (code, printed.startswith("glimmer: no sign of an engine in ")) == (1, True)

    async def test_an_engine_can_be_named(self) -> None:
        write("named", "ready")
        assert await health("--engine", "named") == (0, "")
        assert await health("--engine", GLIMMER_ENGINE_ID="named") == (0, "")
        code, printed = await health("--engine", "name")
        assert (code, printed.startswith("glimmer: no sign of engine name in ")) == (1, True)

    async def test_a_folder_of_somebody_else_is_not_trusted(self) -> None:
        write("engine-1", "ready")
        status_folder().chmod(0o777)
        code, printed = await health("--engine")
        assert (code, "not a private folder" in printed) == (1, True)
        with pytest.raises(OSError, match="not a private folder"):
            EngineStatus("engine-1").write()

    async def test_files_of_killed_engines_are_removed_in_the_end(self) -> None:
        write("old", "ready", pid=2**22 + 1, age_s=3600)
        write("young", "ready", pid=2**22 + 2)  # perhaps of another container with the same folder
        status = EngineStatus("mine")
        status.write()
        status.remove()
        assert [found.id for found in read_statuses()] == ["young"]

    async def test_a_loop_that_stands_still_stops_the_writing(self) -> None:
        status = EngineStatus("mine")
        writing = asyncio.create_task(status.keep())
        await until(lambda: bool(read_statuses()))
        first = read_statuses()[0].written_at
        await until(lambda: read_statuses()[0].written_at > first)
        writing.cancel()
        assert await health("--engine") == (0, "")

    async def test_generated_ids_do_not_name_the_host(self) -> None:
        engine = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PRINT_ENGINE_ID),
            stdout=asyncio.subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not name.startswith("GLIMMER_")},
        )
        printed, _ = await engine.communicate()
        assert re.fullmatch(r"engine-[0-9a-f]{16}\n", printed.decode())


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


def write(engine_id: str, state: EngineState, *, age_s: float = 0.0, **fields: Any) -> None:
    """Write an engine's file as this process, or as one with other `fields`."""
    status = EngineStatus(engine_id)
    status.state = lambda: state
    status.write()
    path = status_folder() / f"{os.getpid()}.json"
    content = json.loads(path.read_text())
    content |= {"written_at": content["written_at"] - age_s, **fields}
    path.unlink()
    (status_folder() / f"{content['pid']}.json").write_text(json.dumps(content))


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
