"""Reading a body without a server."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request

from server.admission.keys import ANONYMOUS
from server.admission.memory_budget import MemoryBudget
from server.requests.body import IncomingBody, ParsedBody

ReadBody = Callable[[IncomingBody], Awaitable[ParsedBody]]


async def read_body(reader: ReadBody, body: bytes, content_type: str, chunk: int, max_bytes: int) -> ParsedBody:
    """Read a body that arrives in chunks of that many bytes. Raises as `IncomingBody.read`."""
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    messages = iter([{"type": "http.request", "body": piece, "more_body": True} for piece in pieces])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content_type.encode())]}
    with MemoryBudget(1).hold(ANONYMOUS) as held:
        return await IncomingBody(Request(scope, receive), max_bytes, held).read(reader)
