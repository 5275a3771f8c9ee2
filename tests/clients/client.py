"""Clients under test. A test calls all of them alike, wherever they run: by a method's name and arguments, for what
comes back as JSON. `bytes` among the arguments is a file's content, and a `Path` a file that the client opens itself.
"""

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer

FOLDER = Path(__file__).parent
PATIENCE_S = 200.0  # a first call waits for imports, too


@asynccontextmanager
async def serving(queue: JobQueue, **settings: Any) -> AsyncIterator[LiveServer]:
    """A server with settings of its own."""
    server = LiveServer(queue, ServerSettings(**settings))
    try:
        yield server
    finally:
        await server.stop()


class Raised(Exception):
    """What a call raised. `kind` is the error's class, `fields` what it carries."""

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
        """What comes of `method` with these arguments, for a request with the headers `headers` beside its own.

        Raises:
            Raised: what the client raised.
        """
        ...


class ClientProcess:
    """A client in a process of its own: a script that answers calls as `calls.mjs` says.

    Args:
        command: what runs it.
        environment: variables beside those there are.
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

    async def call(
        self, server: LiveServer, method: str, *positional: str, key: str = "any", headers: Any = None, **fields: Any
    ) -> Any:
        """As `Client.call`.

        Raises:
            TimeoutError: nothing came back; the client is ended.
        """
        call = {"url": server.url, "key": key, "headers": headers or {}, "method": method}
        line = json.dumps({**call, "positional": positional, "fields": fields}, default=_file)
        try:
            answer = json.loads(await asyncio.wait_for(asyncio.to_thread(self._exchange, line), PATIENCE_S))
        except TimeoutError:
            self._process.kill()  # a thread waits for its output
            raise
        if "error" in answer:
            raise Raised(answer["error"])
        return answer["value"]

    def _exchange(self, line: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _file(value: bytes | Path) -> dict[str, str]:
    return {"$bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else {"$path": str(value)}
