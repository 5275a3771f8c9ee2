"""JSON that contains images, sent in pieces: one image of an answer at a time is in memory."""

import binascii
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import orjson
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import QueueUnavailable
from engine.observability.logs import event
from server.admission.memory_budget import Hold
from server.errors import ApiError
from server.responses.disconnect import cancel_on_disconnect
from server.responses.held_image import HeldImage, ResultLost, reserve

CUT_ERRORS = (QueueUnavailable, ResultLost, ApiError)
"""What ends a response in the middle: the connection is closed, so that the client sees that it is incomplete."""

UNCOUNTED_BYTES = 16 * 1024  # the state of a job is served whatever the memory budget

Part = bytes | HeldImage
Mark = Callable[[int], str]

_TOKEN = secrets.token_hex(16)  # never sent, so in no text of a client

logger = logging.getLogger("glimmer.images")


def split(make_body: Callable[[Mark], dict[str, Any]], images: Sequence[Part]) -> list[Part]:
    """Return the JSON of a body in which `mark(index)` stands for an image: its base64, or a `HeldImage`."""
    head, *tails = orjson.dumps(make_body(lambda index: f"{_TOKEN}{index:02}")).split(_TOKEN.encode())
    parts: list[Part] = [head]
    for tail in tails:
        parts += [images[int(tail[:2])], tail[2:]]
    return parts


async def encoded(parts: Sequence[Part]) -> AsyncGenerator[bytes]:
    """Yield the parts, images as base64. Raises as `HeldImage.pieces`."""
    for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, bytes)):
        if is_text:
            yield joined(group)
            continue
        for image in group:
            assert isinstance(image, HeldImage)
            async with aclosing(image.pieces(base64)) as pieces:
                async for piece in pieces:
                    yield piece


def joined(parts: Iterable[Part]) -> bytes:
    """Return parts without images in one."""
    return b"".join(part for part in parts if isinstance(part, bytes))


async def send_parts(parts: Sequence[Part], send: Send) -> None:
    """Send the parts, images as base64. Raises as `HeldImage.pieces`."""
    async with aclosing(encoded(parts)) as pieces:
        await send_all(pieces, send)


def base64(data: memoryview | bytes) -> bytes:
    """Return `data` as base64."""
    return binascii.b2a_base64(data, newline=False)


def length(parts: Sequence[Part]) -> int:
    """Return the length of the encoded parts."""
    return sum(len(part) if isinstance(part, bytes) else 4 * ((part.size + 2) // 3) for part in parts)


async def respond(
    parts: Sequence[Part],
    held: Hold,
    *,
    patient: bool,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
    background: BackgroundTask | None = None,
) -> Response:
    """Return the response with these parts, once its first image is here. Raises as `HeldImage.load`."""
    first = next((part for part in parts if isinstance(part, HeldImage)), None)
    if first is not None:
        await first.load(patient=patient)
        return PiecesResponse(encoded(parts), length(parts), status_code, headers, background=background)
    content = joined(parts)
    if len(content) > UNCOUNTED_BYTES:
        await reserve(held, len(content), patient=patient)
    return Response(content, status_code, headers, "application/json", background)


class PiecesResponse(Response):
    """Sends pieces as fast as the client takes them; closes the connection if one cannot be made."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        length: int,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "application/json",
        background: BackgroundTask | None = None,
    ) -> None:
        super().__init__(None, status_code, headers, media_type, background)
        self.headers["content-length"] = str(length)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(ClientDisconnect):  # the background task still frees the result
            await cancel_on_disconnect(receive, self._send_pieces(send))
        if self.background is not None:
            await self.background()

    async def _send_pieces(self, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            try:
                await send_all(pieces, send)
            except CUT_ERRORS as error:
                report_cut(error)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_all(pieces: AsyncIterable[bytes], send: Send) -> None:
    """Send pieces of a body that goes on."""
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def report_cut(error: Exception) -> None:
    """Log why a response ends in the middle."""
    event(logger, "response_cut", logging.ERROR, error=type(error).__name__, reason=error)
