"""One connection: pipelining, disconnects, upgrades, 100-continue, and what could be read in two ways."""

import asyncio
import logging
from contextlib import suppress

import pytest

from server.processes.http_limits import MAX_PIPELINED
from tests.server.wire import CHUNKED, GET, WAIT, post, serve
from tests.waiting import until

# --- pipelining and disconnects ---------------------------------------------------------------------------------------

BEHIND = {
    "nothing": b"",
    "a request": GET,
    "many requests": GET * 5000,
    "requests that wait": b"".join(WAIT % n for n in range(1, 9)),
    "half a head": b"GET /live HTTP/1.1\r\nHo",
    "a request with a large body": post(b"a" * 300_000),
    "not HTTP": b"\0\1\2 not HTTP\r\n\r\n" * 10,
    "an endless header": b"GET /live HTTP/1.1\r\nA: " + b"a" * 300_000,
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=list(BEHIND))
@pytest.mark.parametrize("together", [True, False])
async def test_a_disconnect_is_seen_behind_anything(behind: bytes, together: bool) -> None:
    async with serve() as server, server.connect() as wire:
        first = post(b"a" * 70_000, path=b"/wait")
        if together:
            wire.send(first + behind)
        else:
            wire.send(first)
            await until(lambda: server.app.begun)
            wire.send(behind)
        await until(lambda: server.app.begun)
        await wire.close()
        await until(lambda: server.app.disconnected == ["/wait?"])
        await until(lambda: not server.connections)
        assert server.app.begun == ["/wait?"]


async def test_pipelined_requests_are_served_in_order() -> None:
    async with serve() as server, server.connect() as wire:
        wire.send(b"".join(post(b"%d" % n) for n in range(MAX_PIPELINED)))
        for n in range(MAX_PIPELINED):
            response = await wire.response()
            assert response.json["body"] == str(n)


@pytest.mark.parametrize("behind", [WAIT % 1 * 1000, post(b"a" * 200_000), b"\0\1\2\r\n\r\n"])
async def test_what_is_too_far_ahead_ends_the_connection_after_the_responses(behind: bytes) -> None:
    async with serve(linger_s=0.1) as server, server.connect() as wire:
        wire.send(WAIT % 0)
        await until(lambda: server.app.begun)
        for start in range(0, len(behind), 10_000):
            wire.send(behind[start : start + 10_000])
            await asyncio.sleep(0.005)
        server.app.release.set()
        statuses = []
        with suppress(ConnectionError, EOFError):
            while True:
                statuses.append((await wire.response()).status)
        assert statuses[0] == 200
        assert len(statuses) <= 1 + MAX_PIPELINED


# --- upgrades and 100-continue ----------------------------------------------------------------------------------------

OFFERS = [
    (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk",
    ),
    (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: AAAA", b"Sec-WebSocket-Version: 13"),
    (b"Connection: keep-alive, upgrade", b"Upgrade: TLS/1.0, something/2"),
    (b"Upgrade: h2c", b"Connection: close, Upgrade"),
]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 10_000])
async def test_an_offered_upgrade_is_ignored(offer: tuple[bytes, ...], chunked: bool, piece: int) -> None:
    request = post(b"hello", *offer)
    if chunked:
        request = request.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked")
        request = request.removesuffix(b"hello") + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    is_kept = not any(b"close" in header for header in offer)
    async with serve() as server, server.connect() as wire:
        requests = request * 3 if is_kept else request
        for start in range(0, len(requests), piece):
            wire.send(requests[start : start + piece])
            await asyncio.sleep(0)
        for _ in range(3 if is_kept else 1):
            response = await wire.response()
            assert (response.status, response.json["body"]) == (200, "hello")
        assert is_kept or await wire.is_closed()


async def test_100_continue() -> None:
    async with serve() as server, server.connect() as wire:
        for _ in range(2):
            wire.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            interim = await wire.response()
            assert interim.status == 100
            wire.send(b"{}")
            response = await wire.response()
            assert response.json["body"] == "{}"


@pytest.mark.parametrize("sends_anyway", [True, False])
async def test_an_early_response_instead_of_100_continue(sends_anyway: bool) -> None:
    async with serve(linger_s=0.2) as server, server.connect() as wire:
        wire.send(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nExpect: 100-continue\r\n\r\n")
        if sends_anyway:
            wire.send(b"a" * 100_000)
        response = await wire.response()
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert await wire.is_closed()


# --- what could be read in two ways -----------------------------------------------------------------------------------

UNCLEAR = {
    "two lengths": post(b"a", b"Content-Length: 1"),
    "two different lengths": post(b"a", b"Content-Length: 2"),
    "a list of lengths": post(b"a").replace(b": 1", b": 1, 1"),
    "a signed length": post(b"a").replace(b": 1", b": +1"),
    "an enormous length": post(b"a").replace(b": 1", b": 99999999999999999999999"),
    "length and chunks": post(b"a", b"Transfer-Encoding: chunked"),
    "an unknown encoding": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "chunks inside": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "a bad chunk size": CHUNKED + b"zz\r\n",
    "an enormous chunk size": CHUNKED + b"ffffffffffffffffffff\r\n",
    "a chunk without its end": CHUNKED + b"1\r\nab\r\n",
    "a length as trailer": CHUNKED + b"1\r\na\r\n0\r\nContent-Length: 1\r\n\r\n",
    "NUL in a header": post(b"a", b"A: a\0b"),
    "NUL in a name": post(b"a", b"A\0: b"),
    "a folded header": post(b"a", b"A: a", b" b"),
    "a space before the colon": post(b"a", b"A : b"),
    "bare line feeds": b"GET /live HTTP/1.1\nHost: x\n\n",
    "two hosts": post(b"a", b"Host: y"),
    "a host with a path": GET.replace(b": x", b": x/live"),
    "half an address": GET.replace(b": x", b": [::1"),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
    "all of the server": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL that is none": b"GET http://x:99999/ HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", UNCLEAR.values(), ids=list(UNCLEAR))
async def test_unclear_requests_are_refused(request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(head_s=1.0, body_s=1.0, linger_s=0.1) as server, server.connect() as wire:
        wire.send(request_bytes)
        response = await wire.response()
        assert (response.status, response.json["error"]["type"]) == (400, "invalid_request_error")
        assert response.headers["connection"] == "close"
        assert await wire.is_closed()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


@pytest.mark.parametrize(
    ("target", "begun"),
    [
        (b"http://x/live", "/live?"),
        (b"http://x", "/?"),
        (b"http://x?a=b", "/?a=b"),
        (b"//x/y", "//x/y?"),
        (b"/%00%ff", "/\0\ufffd?"),
    ],
)
async def test_unusual_targets_are_served(target: bytes, begun: str) -> None:
    async with serve() as server, server.connect() as wire:
        wire.send(b"GET %s HTTP/1.1\r\nHost: [::1]:80\r\n\r\n" % target)
        response = await wire.response()
        assert response.status == 200
        assert server.app.begun == [begun]


async def test_a_shutdown_waits_for_the_upload_in_progress() -> None:
    async with serve() as server, server.connect() as wire, server.connect() as idle:
        wire.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        await until(lambda: server.app.begun)
        for connection in list(server.connections):
            connection.shutdown()
        assert await idle.is_closed()
        wire.send(b"b")
        response = await wire.response()
        assert (response.json["body"], response.headers["connection"]) == ("ab", "close")
        assert await wire.is_closed()
