"""A server that can never hold the queue is refused at the start; one that is away may come back."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from engine.errors import StartError
from engine.jobs import redis_check
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.redis_check import check_redis

INFO = "# Server\r\nredis_version:{}\r\n"


def bulk(text: str) -> bytes:
    return f"${len(text)}\r\n{text}\r\n".encode()


@asynccontextmanager
async def server(answer: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """Yield the URL of a server that gives one answer to each packet."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while packet := await reader.read(4096):
            writer.write(answer(packet))
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
    finally:
        listener.close()


def says(info: str) -> Callable[[bytes], bytes]:
    """Return a server that takes all commands, of which INFO gives an answer."""

    def answer(packet: bytes) -> bytes:
        if b"HELLO" in packet:
            return b"%1\r\n$5\r\nproto\r\n:3\r\n"
        return bulk(info) if b"INFO" in packet else b"+OK\r\n" * packet.count(b"*")

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not Redis"),
        (lambda _: b"SSH-2.0-OpenSSH_9.6\r\n", "is not Redis"),
        (lambda _: b"-NOAUTH Authentication required.\r\n", "user or password"),
        (lambda _: b"-WRONGPASS invalid username-password pair or user is disabled.\r\n", "user or password"),
        (lambda _: b"-ERR DB index is out of range\r\n", "no database of that number"),
        (says(INFO.format("5.0.14")), "Redis 5.0.14; 6.2 or newer"),
        (says(INFO.format("6.0.20")), "Redis 6.0.20; 6.2 or newer"),
    ],
)
async def test_servers_that_can_never_hold_the_queue(answer: Callable[[bytes], bytes], reason: str) -> None:
    async with server(answer) as url:
        with pytest.raises(StartError, match=f"GLIMMER_REDIS_URL: the server there .*{reason}") as caught:
            await check_redis(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        *(says(INFO.format(version)) for version in ("6.2.0", "7.4.1", "10.0", "255.255.255", "unstable")),
        says("# Server\r\nvalkey\r\n"),
        lambda _: b"-LOADING Redis is loading the dataset in memory\r\n",
        lambda _: b"-NOPERM this user has no permissions to run the 'info' command\r\n",
        lambda _: b"-MASTERDOWN Link with MASTER is down\r\n",
    ],
)
async def test_those_that_can_or_may_soon(answer: Callable[[bytes], bytes]) -> None:
    async with server(answer) as url:
        await check_redis(url)


async def test_one_that_is_away_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_check, "CHECK_TIMEOUT_S", 0.2)
    await check_redis("unix:///nowhere.sock")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        await check_redis(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")


@pytest.mark.parametrize("url", [f"unix:///{'a' * 120}", f"redis://{'a' * 80}/0"])
async def test_an_address_that_no_server_can_have(url: str) -> None:
    with pytest.raises(StartError, match="cannot be reached"):
        await check_redis(url)


async def test_the_embedded_one(redis_server: EmbeddedRedis) -> None:
    await check_redis(redis_server.url)
    with pytest.raises(StartError, match="no database of that number"):
        await check_redis(redis_server.url + "?db=99")
