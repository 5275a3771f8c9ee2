"""Clients under test. All are called alike, by a method's name and arguments, and return JSON.

`bytes` among the arguments is the content of a file, a `Path` a file that the client opens itself.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CALL_TIMEOUT_S = 200.0  # the first call includes imports


@asynccontextmanager
async def serving(queue: JobQueue, **settings: Any) -> AsyncIterator[LiveServer]:
    """Run a server with these settings."""
    server = LiveServer(queue, ServerSettings(**settings))
    try:
        yield server
    finally:
        await server.stop()


class Raised(Exception):
    """The exception that a call raised: its class in `kind`, its attributes in `fields`."""

    def __init__(self, fields: dict[str, Any]):
        super().__init__(f"{fields['kind']}: {fields['message']}")
        self.kind: str = fields["kind"]
        self.fields = fields

    def __getitem__(self, field: str) -> Any:
        return self.fields.get(field)


class Client(Protocol):
    async def call(
        self, server: LiveServer, method: str, *positional: str, key: str = "any", headers: Any = None, **fields: Any
    ) -> Any:
        """Call `method` with these arguments and additional `headers`.

        Raises:
            Raised: the client raised an exception.
        """
        ...


class LineProcess:
    """A process that answers each line of its input with a line of output.

    Args:
        command: of the process.
        environment: additional variables.
    """

    def __init__(self, *command: str | Path, **environment: str):
        self._process = subprocess.Popen(
            command,
            cwd=FOLDER,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        with self._process:
            self._process.kill()

    async def exchange(self, line: str) -> str:
        """Return the answer to a line.

        Raises:
            TimeoutError: no response; the process is killed.
        """
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._exchange, line), CALL_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()  # ends the thread that waits for output
            raise

    def _exchange(self, line: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


class ClientProcess(LineProcess):
    """A client in its own process: a script that serves calls (see `calls.mjs`)."""

    async def call(
        self, server: LiveServer, method: str, *positional: str, key: str = "any", headers: Any = None, **fields: Any
    ) -> Any:
        """Call as `Client.call`. Raises also as `exchange`."""
        call = {"url": server.url, "key": key, "headers": headers or {}, "method": method}
        line = json.dumps({**call, "positional": positional, "fields": fields}, default=_file)
        result = json.loads(await self.exchange(line))
        if "error" in result:
            raise Raised(result["error"])
        return result["value"]


class JavaClient(LineProcess):
    """The JDK's HTTP client, in `Requests.java`."""

    async def send(
        self,
        method: str,
        url: str,
        body: bytes = b"",
        kind: str = "application/json",
        way: str = "whole",
        key: str = "k",
    ) -> tuple[int, bytes]:
        """Return status and body of a response. `way`: "whole", "stream" or "continue"."""
        words = (method, url, key, kind.replace(" ", "%20"), base64.b64encode(body).decode(), way)
        status, _, content = (await self.exchange(" ".join(words))).partition(" ")
        return int(status), base64.b64decode(content)


def python_client(module: str, **environment: str) -> ClientProcess:
    """Start a script of this folder that serves calls."""
    return ClientProcess(sys.executable, "-m", f"tests.clients.{module}", PYTHONPATH=str(ROOT), **environment)


def _file(value: bytes | Path) -> dict[str, str]:
    return {"$bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else {"$path": str(value)}
