"""Whatever arrives, in whatever pieces: each connection ends or responds, in the same way, and nothing raises."""

import asyncio
import itertools
import logging
import queue
from collections.abc import Sequence
from logging.handlers import QueueHandler
from typing import Any

import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from server.processes.http_limits import MIN_BYTES_PER_S, HttpLimits
from server.processes.http_pace import Pace
from server.processes.http_protocol import http_protocol
from tests.server.wire import CHUNKED, App, post

REQUESTS = [
    b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x/echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    post(b"hello"),
    post(b"hello", b"Expect: 100-continue"),
    post(b"hello", b"Connection: Upgrade", b"Upgrade: h2c"),
    CHUNKED + b"5;a=b\r\nhello\r\n0\r\nTrailer: x\r\n\r\n",
    CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n") + b"1\r\na\r\n0\r\n\r\n",
]
STATUSES = {100, 200, 400, 408, 414, 431}


@st.composite
def inputs(draw: st.DrawFn) -> bytes:
    """Draw up to three requests with up to four changed bytes or repeated or lost parts."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data[start:end] = draw(st.sampled_from([b"", bytes(data[start:end]) * 2]) | st.binary(max_size=3))
    return bytes(data)


class FakeTransport:
    """A transport whose client reads at once."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.sent, self._protocol, self._is_closing = b"", protocol, False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else None

    def write(self, data: bytes) -> None:
        assert not self._is_closing
        self.sent += data

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        return 0

    def write_eof(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


class ReadingApp(App):
    """Reads every body: a response before its end depends on how much of it has arrived."""

    _live = App._echo


async def statuses(pieces: Sequence[bytes]) -> list[int]:
    """Return the final statuses that a connection gets before and after its time-outs."""
    config = uvicorn.Config(ReadingApp(), lifespan="off", log_config=None, access_log=False)
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    protocol = http_protocol(HttpLimits())(config, ServerState(), {})
    transport = FakeTransport(protocol)
    protocol.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        if not transport.is_closing():
            protocol.data_received(piece)
        await settle()
    for _ in range(3):  # a body, what follows its 408, keep-alive
        protocol.check(asyncio.get_running_loop().time() + 1000)
        await settle()
    assert transport.is_closing()
    assert not errors
    return [status for status in _parse(transport.sent) if status != 100]


def _parse(sent: bytes) -> list[int]:
    found = []
    while sent:
        head, _, sent = sent.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        assert status.startswith("HTTP/1.1 ")
        headers = dict(line.split(": ", 1) for line in lines)
        sent = sent[int(headers.get("content-length", 0)) :]
        found.append(int(status.split(" ")[1]))
    assert set(found) <= STATUSES
    return found


EARLY = (
    b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n" + CHUNKED.replace(b"echo", b"!echo") + b"\x005;a=b\r\nhello\r\n0\r\n\r\n"
)


@example(EARLY, [31])
@given(inputs(), st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=300, deadline=None)
def test_anything_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    logged: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = QueueHandler(logged)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        borders = [0, *sorted(cuts), len(data)]
        pieces = [data[start:end] for start, end in itertools.pairwise(borders) if start < end]
        assert asyncio.run(statuses(pieces)) == asyncio.run(statuses([data]))
    finally:
        logging.getLogger().removeHandler(handler)
    assert logged.empty()


# --- pace -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 9.9), min_size=1, max_size=50), st.floats(1.0, 1000.0))
def test_a_steady_transfer_is_never_late(gaps: list[float], factor: float) -> None:
    pace, now = Pace(10.0), 0.0
    pace.start(now)
    for gap in gaps:
        now += gap
        pace.progress(now, int(gap * MIN_BYTES_PER_S * factor) + 1)
        assert not pace.is_late(now)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=50), st.floats(0.0, 0.5), st.integers(0, 1 << 40))
def test_a_transfer_that_becomes_too_slow_is_late(gaps: list[float], factor: float, before: int) -> None:
    pace, now = Pace(10.0), 0.0
    pace.start(now)
    pace.progress(now, before)
    while now < 25.0:
        for gap in gaps:
            now += gap
            pace.progress(now, int(gap * MIN_BYTES_PER_S * factor))
    assert pace.is_late(now)
