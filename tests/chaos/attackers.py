"""Clients that attack an API; they run in a process of their own, so that honest clients do not wait for them."""

import asyncio
import itertools
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from tests.chaos.hostile_requests import EDITS, HostileRequest, hostile_requests

ENDED_S = 60.0  # the longest time-out of a connection, and a margin
UNREAD_S = 36.0  # a response that nobody reads has ended by then
RESPONSE_S = 120.0
RETRY_S = 1.0
OPENING = 64  # connections at once
UPLOAD_BYTES = 8_000_000
CHUNK = b" " * 2**16


@dataclass(frozen=True)
class Target:
    """An API, and the attackers' key."""

    host: str
    port: int
    key: str

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)


@dataclass
class Tally:
    """What became of connections, by kind.

    Args:
        open_for: the longest time that one was open, in seconds.
        left: not ended by the server.
        responses: status or error by request.
    """

    opened: Counter[str] = field(default_factory=Counter)
    open_for: dict[str, float] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    responses: Counter[tuple[str, str]] = field(default_factory=Counter)

    def ended(self, kind: str, began: float) -> None:
        self.open_for[kind] = max(self.open_for.get(kind, 0.0), time.monotonic() - began)


# --- slow clients -----------------------------------------------------------------------------------------------------


def slow_clients(target: Target, answer: str, connections: int, seconds: float) -> Tally:
    """Hold idle connections, and an eighth of half heads, stalled uploads and slow readers each, for `seconds`.

    Returns when the server has ended them all.

    Args:
        answer: path of a large response.
    """
    return asyncio.run(_SlowClients(target, time.monotonic() + seconds).run(answer, connections))


class _SlowClients:
    def __init__(self, target: Target, until: float):
        self._target, self._until = target, until
        self._opening = asyncio.Semaphore(OPENING)
        self._tally = Tally()

    async def run(self, answer: str, connections: int) -> Tally:
        each = connections // 8
        async with asyncio.TaskGroup() as group:
            for kind, count, client in (
                ("idle", connections, self._wait),
                ("half a head", each, self._send_half_a_head),
                ("stalled upload", each, self._stall),
                ("slow reader", each, lambda began: self._read_late(answer, began)),
            ):
                for _ in range(count):
                    group.create_task(self._repeat(kind, client))
        return self._tally

    async def _repeat(self, kind: str, client: Callable[[float], Awaitable[None]]) -> None:
        while (began := time.monotonic()) < self._until:
            self._tally.opened[kind] += 1
            try:
                async with asyncio.timeout(ENDED_S):
                    await client(began)
            except TimeoutError:
                self._tally.left[kind] += 1
            except OSError:
                pass  # reset
            self._tally.ended(kind, began)
            await asyncio.sleep(RETRY_S)

    async def _wait(self, began: float) -> None:
        await self._send_and_wait(())

    async def _send_half_a_head(self, began: float) -> None:
        await self._send_and_wait([b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Half: "])

    async def _stall(self, began: float) -> None:
        head = (
            b"POST %b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n"
        ) % (EDITS, self._target.key.encode(), UPLOAD_BYTES)
        whole, rest = divmod(UPLOAD_BYTES - 1, len(CHUNK))
        await self._send_and_wait([head, *[CHUNK] * whole, CHUNK[:rest]])

    async def _send_and_wait(self, data: Iterable[bytes]) -> None:
        async with self._opening:
            reader, writer = await self._target.open()
        try:
            for piece in data:
                writer.write(piece)
                await writer.drain()
            while await reader.read(2**16):
                pass
        finally:
            writer.transport.abort()

    async def _read_late(self, answer: str, began: float) -> None:
        """Ask for the response, read its status, and the rest long after."""
        loop, connection = asyncio.get_running_loop(), socket.socket()
        with connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            async with self._opening:
                await loop.sock_connect(connection, (self._target.host, self._target.port))
            request = f"GET {answer} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._target.key}\r\n"
            await loop.sock_sendall(connection, f"{request}Connection: close\r\n\r\n".encode())
            status = (await loop.sock_recv(connection, 12)).decode()[-3:]
            self._tally.responses["slow reader", status] += 1
            if status == "200":
                await asyncio.sleep(began + UNREAD_S - time.monotonic())
            last = b""
            while data := await loop.sock_recv(connection, 2**16):
                last = data
            if status == "200" and last.endswith((b"}", b"0\r\n\r\n")):
                self._tally.left["slow reader"] += 1  # the whole response was kept


# --- hostile requests -------------------------------------------------------------------------------------------------


def send_hostile_requests(target: Target, clients: int, seed: int, seconds: float) -> Tally:
    """Send hostile requests in a loop for `seconds`, without a key, with a wrong one and with a valid one in turn."""
    return asyncio.run(_send_all(target, clients, seed, seconds))


async def _send_all(target: Target, clients: int, seed: int, seconds: float) -> Tally:
    requests, tally, rng = hostile_requests(), Tally(), random.Random(seed)
    until = time.monotonic() + seconds

    async def client(order: list[HostileRequest]) -> None:
        for number, request in enumerate(itertools.cycle(order)):
            if time.monotonic() > until:
                return
            began, key = time.monotonic(), (target.key, target.key, "wrong", None)[number % 4]
            tally.opened[request.name] += 1
            tally.responses[request.name, await _send(target, request, key)] += 1
            tally.ended(request.name, began)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(rng.sample(requests, len(requests))))
    return tally


async def _send(target: Target, request: HostileRequest, key: str | None) -> str:
    """Return the status of the response, or how the connection ended."""
    reader, writer = await target.open()
    authorization = f"Authorization: Bearer {key}\r\n".encode() if key else b""
    sending = asyncio.create_task(_write(writer, request.head + authorization + b"\r\n" + request.body))
    try:
        async with asyncio.timeout(RESPONSE_S):
            line = await reader.readline()
        return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "none"
    except OSError:
        return "reset"
    finally:
        sending.cancel()
        await asyncio.wait([sending])
        writer.transport.abort()


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), len(CHUNK)):
        writer.write(data[start : start + len(CHUNK)])
        await writer.drain()
