"""Connections to the Redis that takes writes, where that may change: a master behind Sentinels, or one of a cluster.

Each connection asks for the address before it connects, and is closed by an answer of a server that is no longer the
master, so that a failover costs the calls in flight and no more.
"""

import asyncio
import itertools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio import Connection, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

Address = tuple[str, int]

MASTER_SCHEME = re.compile(r"rediss?\+(sentinel|cluster)")

CLUSTER_PREFIX = "{glimmer}"
"""Of all keys in a cluster: the braces put them into one slot, so that scripts can use them together."""

_ASK_TIMEOUT_S, _FOUND_FOR_S = 0.5, 0.1
_PORTS = {"sentinel": 26379, "cluster": 6379}
_DEMOTED = ("READONLY", "NOREPLICAS")


class Master(ABC):
    """Knows where the master is.

    Args:
        servers: that are asked, in turn until one knows.
        options: of the connections to them.
    """

    def __init__(self, servers: Sequence[Address], options: dict[str, Any]) -> None:
        self._servers, self._count, self._options = itertools.cycle(servers), len(servers), options
        self._lock = asyncio.Lock()
        self._found: Address | None = None
        self._found_at = 0.0

    async def find(self) -> Address:
        """Return the address; connections that are made at once share one question."""
        async with self._lock:
            if self._found is None or time.monotonic() - self._found_at > _FOUND_FOR_S:
                self._found, self._found_at = await self._ask_in_turn(), time.monotonic()
            return self._found

    async def _ask_in_turn(self) -> Address:
        errors = []
        for host, port in itertools.islice(self._servers, self._count):  # the next time begins with the next server
            try:
                async with redis.asyncio.Redis(host=host, port=port, **self._options) as server:
                    if found := await self._ask(server):
                        return found[0] or host, found[1]
                errors.append(f"{host}:{port} knows none")
            except (RedisError, OSError) as error:
                errors.append(f"{host}:{port}: {getattr(error, 'status_code', None) or ''} {error}")
        raise RedisConnectionError(f"no master was found ({'; '.join(errors)})")

    @abstractmethod
    async def _ask(self, server: redis.asyncio.Redis) -> Address | None:
        """Return the address, with an empty host for that of the server."""


class SentinelMaster(Master):
    """The master that Sentinels name."""

    def __init__(self, servers: Sequence[Address], options: dict[str, Any], name: str) -> None:
        super().__init__(servers, options)
        self._name = name

    async def _ask(self, server: redis.asyncio.Redis) -> Address | None:
        found = await server.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name, NEVER_DECODE=True)
        return (found[0].decode(), int(found[1])) if found else None


class ClusterMaster(Master):
    """The master of the queue's slot."""

    _slot = key_slot(CLUSTER_PREFIX.encode())

    async def _ask(self, server: redis.asyncio.Redis) -> Address | None:
        ranges: list[Any] = await server.execute_command("CLUSTER", "SLOTS", NEVER_DECODE=True) or []
        for first, last, (host, port, *_), *_ in ranges:
            if first <= self._slot <= last:
                return (host or b"").decode(), port
        return None


class MasterConnection(Connection):
    """A connection to the present master."""

    def __init__(self, *, master: Master, **options: Any) -> None:
        self._master = master
        super().__init__(**options)

    async def _connect(self) -> None:
        self.host, self.port = await self._master.find()
        await super()._connect()

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read; an answer of a former master closes the connection, and the call is repeated on a new one."""
        try:
            return await super().read_response(*args, **options)
        except (AskError, ClusterDownError) as error:  # MOVED, too
            await self.disconnect()
            raise RedisConnectionError(f"this node is not the master of the queue: {error}") from error
        except ResponseError as error:
            if any(code in str(error) or code == error.status_code for code in _DEMOTED):
                await self.disconnect()
            raise


class MasterSSLConnection(MasterConnection, SSLConnection):
    """The same over TLS."""


def master_options(scheme: str, netloc: str, path: str, query: str) -> dict[str, Any]:
    """Return what a connection pool takes for the parts of a `redis[s]+sentinel://` or `redis[s]+cluster://` URL.

    Raises:
        ValueError: invalid.
    """
    transport, _, kind = scheme.partition("+")
    userinfo, at, hosts = netloc.rpartition("@")
    servers = [_address(host, _PORTS[kind]) for host in hosts.split(",")]
    name, _, database = path.strip("/").partition("/") if kind == "sentinel" else ("", "", path.strip("/"))
    options: dict[str, Any] = dict(parse_url(f"{transport}://{userinfo}{at}host/{database}?{query}"))
    for unused in ("host", "connection_class"):
        options.pop(unused, None)
    own = {key: options.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    asking = {key: value for key, value in options.items() if key.startswith("ssl_")} | {
        "ssl": transport == "rediss",
        "socket_timeout": _ASK_TIMEOUT_S,
        "socket_connect_timeout": _ASK_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    if kind == "sentinel":
        if not name:
            raise ValueError("no name of a master")
        options["master"] = SentinelMaster(servers, asking | {key: value for key, value in own.items() if value}, name)
    else:
        if int(database or 0) or int(options.get("db") or 0):
            raise ValueError("a cluster has one database")
        credentials = {key: options[key] for key in ("username", "password") if key in options}
        options["master"] = ClusterMaster(servers, asking | credentials)
    return options | {"connection_class": MasterSSLConnection if asking["ssl"] else MasterConnection}


def _address(text: str, default_port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path:
        raise ValueError("no host")
    return parts.hostname, parts.port or default_port


def key_prefix(client: redis.asyncio.Redis) -> str:
    """Return the prefix of the queue's keys at this client's server."""
    options = client.connection_pool.connection_kwargs
    return CLUSTER_PREFIX if isinstance(options.get("master"), ClusterMaster) else "glimmer"
