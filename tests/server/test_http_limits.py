"""What connections can do to a server, whatever they send and however slowly: heads, time-outs, numbers."""

import asyncio
import socket
import subprocess
import sys

import pytest

from server.processes.http_limits import MAX_HEADERS, ConnectionTable, HttpLimits, share_files
from server.processes.serving import UNSENT_BYTES
from tests.server.wire import CHUNKED, GET, PIECE, WAIT, Wire, WireServer, post, serve
from tests.waiting import until

# --- heads ------------------------------------------------------------------------------------------------------------

ENDLESS = {
    "one header": (b"GET /live HTTP/1.1\r\nHost: x\r\nA: ", b"a" * 65536, 431),
    "the name of a header": (b"GET /live HTTP/1.1\r\nHost: x\r\n", b"a" * 65536, 431),
    "headers": (b"GET /live HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 10_000, 431),
    "empty headers of the body's length": (b"GET /live HTTP/1.1\r\n", b"a:\r\n" * 10_000, 431),
    "the URL": (b"GET /", b"a" * 65536, 414),
    "the query": (b"GET /live?", b"a=b&" * 16384, 414),
    "empty lines": (b"", b"\r\n" * 32768, 431),
    "a trailer": (CHUNKED + b"1\r\na\r\n0\r\nA: ", b"a" * 65536, 431),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * 10_000, 431),
    "a chunk extension": (CHUNKED + b"1;a=", b"a" * 65536, 431),
    "a chunk size": (CHUNKED, b"0" * 65536, 431),
}


@pytest.mark.parametrize(("start", "more", "status"), ENDLESS.values(), ids=list(ENDLESS))
async def test_what_never_ends_is_refused_early(start: bytes, more: bytes, status: int) -> None:
    async with serve(linger_s=0.2) as server, server.connect() as wire:
        wire.send(start)

        async def flood() -> None:
            while True:
                wire.send(more)
                await wire.writer.drain()

        flooding = asyncio.create_task(flood())
        response = await wire.response()
        await asyncio.wait([flooding])
        assert isinstance(flooding.exception(), ConnectionError)
        assert response.status == status
        assert response.json["error"]["code"] in ("headers_too_large", "url_too_long")
        assert server.app.received < 256 * 1024
        assert await server.is_live()


async def test_large_heads_within_the_limit_are_served() -> None:
    headers = [b"X-%d: %s" % (n, b"a" * 240) for n in range(MAX_HEADERS - 2)]
    async with serve() as server, server.connect() as wire:
        for _ in range(3):
            wire.send(post(b"{}", *headers))
            response = await wire.response()
            assert response.status == 200


async def test_large_bodies_in_many_chunks_are_no_heads() -> None:
    async with serve() as server, server.connect() as wire:
        wire.send(CHUNKED + b"1;extension=of-this-chunk\r\na\r\n" * 100_000 + b"0\r\nTrailer: x\r\n\r\n")
        response = await wire.response()
        assert response.status == 200
        assert (len(response.json["body"]), "trailer" in response.json["headers"]) == (100_000, False)


# --- time -------------------------------------------------------------------------------------------------------------

STALLED = {
    "half a head": (b"GET /live HTTP/1.1\r\nHo", b""),
    "a head, letter by letter": (b"GET /live HTTP/1.1\r\nA: ", b"a"),
    "half a body": (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{", b""),
    "a body without its last byte": (
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n" + b"a" * 100_000,
        b"",
    ),
    "a body, letter by letter": (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n", b"a"),
    "half a chunk": (CHUNKED + b"100\r\na", b""),
    "a chunk size, letter by letter": (CHUNKED, b"0"),
}


@pytest.mark.parametrize(("start", "drip"), STALLED.values(), ids=list(STALLED))
async def test_a_stalled_request_gets_a_408(start: bytes, drip: bytes) -> None:
    async with serve(head_s=0.3, body_s=0.3, linger_s=0.1) as server, server.connect() as wire:
        wire.send(start)

        async def dripping() -> None:
            while drip:
                wire.send(drip)
                await asyncio.sleep(0.02)

        drops = asyncio.create_task(dripping())
        response = await wire.response()
        drops.cancel()
        assert (response.status, response.json["error"]["code"]) == (408, "request_timeout")
        assert response.headers["connection"] == "close"
        assert await wire.is_closed()


async def test_a_silent_connection_is_closed_without_a_response() -> None:
    async with serve(head_s=0.2) as server, server.connect() as wire:
        assert await wire.is_closed()


async def test_a_slow_upload_is_served() -> None:
    async with serve(body_s=1.0) as server, server.connect() as wire:
        wire.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 15000\r\n\r\n")
        for _ in range(15):
            wire.send(b"a" * 1000)
            await asyncio.sleep(0.1)
        response = await wire.response()
        assert response.status == 200


@pytest.mark.parametrize("path", [b"/large", b"/pieces"])
async def test_a_response_that_is_not_read_is_dropped(path: bytes) -> None:
    async with serve(response_s=0.3) as server, server.connect() as wire:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        await until(lambda: server.app.begun)
        await until(lambda: not server.connections)
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionError, EOFError)):
            await wire.response()


@pytest.mark.parametrize("path", [b"/large", b"/pieces"])
async def test_a_response_that_is_read_slowly_is_complete(path: bytes) -> None:
    async with serve(response_s=0.7) as server, server.connect() as wire:
        wire.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        await wire.reader.readuntil(b"\r\n\r\n")
        left = len(PIECE) * 256
        while left:
            left -= len(await wire.reader.read(1 << 20))
            await asyncio.sleep(0.02)


async def test_a_silent_stream_is_untouched() -> None:
    limits = dict.fromkeys(("head_s", "body_s", "response_s", "linger_s"), 0.1)
    async with serve(**limits) as server, server.connect() as wire:
        wire.send(b"GET /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await wire.reader.read()).endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


async def test_a_body_that_does_not_end_after_its_response() -> None:
    async with serve(linger_s=0.3) as server, server.connect() as wire:
        wire.send(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        response = await wire.response()
        assert response.status == 200

        async def flood() -> None:
            while True:
                wire.send(PIECE)
                await wire.writer.drain()
                await asyncio.sleep(0.001)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(flood(), 20)


async def test_a_body_that_ends_after_its_response_keeps_the_connection() -> None:
    async with serve() as server, server.connect() as wire:
        wire.send(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
        response = await wire.response()
        wire.send(b"a" * 200_000 + GET)
        again = await wire.response()
        assert (response.status, again.status) == (200, 200)


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"GET /live HTT", GET], ids=["idle", "half a head", "kept alive"])
async def test_the_longest_waiting_connection_makes_room(start: bytes) -> None:
    async with serve(connections=8) as server:
        wires: list[Wire] = []
        for _ in range(24):
            wire = Wire(*await asyncio.open_connection(*server.address))
            wire.send(start)
            if start == GET:
                await wire.response()
            wires.append(wire)
            await until(lambda: len(server.connections) == min(8, len(wires)))
        assert await server.is_live()
        for wire in wires[:16]:
            assert await wire.is_closed()
        wires[-1].send(GET[len(start) % len(GET) :])
        response = await wires[-1].response()
        assert response.status == 200
        for wire in wires:
            await wire.close()


async def test_requests_in_progress_keep_their_connections() -> None:
    async with serve(connections=4) as server:
        wires: list[Wire] = []
        for number in range(4):
            wire = Wire(*await asyncio.open_connection(*server.address))
            wire.send(WAIT % number)
            wires.append(wire)
        await until(lambda: len(server.app.begun) == 4)
        for _ in range(3):
            async with server.connect() as wire:
                refused = await wire.response()
                assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        server.app.release.set()
        for wire in wires:
            response = await wire.response()
            assert response.status == 200
            await wire.close()
        assert await server.is_live()


UNREAD = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 16


async def stop_reading(server: WireServer) -> Wire:
    """Open a connection that asks for much and reads nothing."""
    begun = len(server.app.begun)
    wire = Wire(*await asyncio.open_connection(*server.address))
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    wire.send(UNREAD)
    await until(lambda: len(server.app.begun) > begun)
    return wire


async def test_clients_that_do_not_read_make_room_the_longest_first() -> None:
    async with serve(connections=4) as server:
        wires = [await stop_reading(server) for _ in range(3)]
        waiting = Wire(*await asyncio.open_connection(*server.address))
        waiting.send(WAIT % 1)
        await until(lambda: len(server.app.begun) == 4)
        oldest = wires[0].writer.get_extra_info("sockname")
        for _ in range(3):
            assert await server.is_live()
        peers = {connection.transport.get_extra_info("peername") for connection in server.connections}
        assert oldest not in peers
        assert wires[2].writer.get_extra_info("sockname") in peers
        server.app.release.set()
        assert (await waiting.response()).status == 200
        for wire in (*wires, waiting):
            wire.writer.transport.abort()


async def test_a_pipelined_request_starts_when_the_response_before_is_read() -> None:
    async with serve() as server:
        wire = await stop_reading(server)
        await server.is_live()
        assert server.app.begun.count("/large?") == 1
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(16):
            response = await wire.response()
            assert len(response.body) == 256 * len(PIECE)
        await wire.close()


async def test_what_is_not_read_is_bounded_over_all_connections() -> None:
    async with serve(unsent_bytes=2 * 256 * len(PIECE)) as server:
        wires = [await stop_reading(server) for _ in range(6)]
        await until(lambda: len(server.connections) <= 3)
        unsent = sum(connection.unsent_bytes for connection in server.connections)
        assert 0 < unsent <= 2 * 256 * len(PIECE)
        assert await server.is_live()
        for wire in wires:
            wire.writer.transport.abort()


class Unread:
    """A connection of which 1000 bytes are unsent."""

    looks = 0

    @property
    def unsent_bytes(self) -> int:
        type(self).looks += 1
        return 1000

    def check(self, now: float) -> None: ...

    def evict(self) -> None: ...


async def test_counting_what_is_not_read_takes_time_in_proportion_to_the_connections() -> None:
    table, number = ConnectionTable(HttpLimits(connections=10_000, unsent_bytes=500_000)), 5000
    for _ in range(number):
        connection = Unread()
        table.add(connection)
        table.unread(connection)
    assert Unread.looks < 20 * number


async def test_the_kernel_takes_little_of_what_is_not_read() -> None:
    """With 32 KiB of a client's, Linux would take 2.5 MB of each response."""
    async with serve() as server:
        wires = [await stop_reading(server) for _ in range(4)]
        unsent = [connection.unsent_bytes for connection in server.connections]
        assert min(unsent) > 16 * 2**20 - 16 * UNSENT_BYTES
        for wire in wires:
            wire.writer.transport.abort()


LOW_LIMIT = """
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
import asyncio, socket
from server.processes.http_limits import raise_file_limit, share_files
from tests.server.wire import serve
async def main():
    connections, _ = share_files(raise_file_limit())
    async with serve(connections=connections) as server:
        print(server.address[1], flush=True)
        await asyncio.to_thread(input)
asyncio.run(main())
"""


def test_idle_connections_do_not_use_up_the_files() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOW_LIMIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        assert server.stdin
        address = ("127.0.0.1", int(server.stdout.readline()))
        idle = [socket.create_connection(address) for _ in range(200)]
        with socket.create_connection(address, timeout=20) as probe:
            probe.sendall(GET)
            assert probe.recv(12) == b"HTTP/1.1 200"
        for connection in idle:
            connection.close()
        server.stdin.write("\n")


def test_connections_leave_files_for_others() -> None:
    for files in (64, 1024, 20_000, 1 << 20):
        connections, backlog = share_files(files)
        assert 0 < connections <= 4096
        assert connections + backlog <= files * 3 // 4
