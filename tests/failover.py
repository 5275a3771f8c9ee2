"""Redis that fails over, as real processes on loopback: a master with replicas and Sentinels, and a cluster."""

import os
import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis.retry import Retry

from engine.child import die_with_parent
from engine.jobs.embedded import find_redis_server
from engine.jobs.masters import CLUSTER_PREFIX

USER, PASSWORD, NAME = "glimmer", "p@ss,word/1", "images"
PASSWORD_IN_URL = "p%40ss%2Cword%2F1"
NODE_TIMEOUT_MS = 1000  # silence after which a master counts as down
START_S = 60.0
CLUSTER_SLOTS = 16384


class Server:
    """A `redis-server` that can be killed and started again; in the main thread, with which it ends."""

    def __init__(self, folder: Path, port: int, *options: str, sentinel: str | None = None) -> None:
        folder.mkdir(parents=True)
        self.port, self._log = port, folder / "log"
        command = [str(find_redis_server())]
        if sentinel is not None:
            (folder / "sentinel.conf").write_text(sentinel)  # it writes into the file
            command += [str(folder / "sentinel.conf"), "--sentinel"]
        command += ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *options]
        self._command = command
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(die_with_parent(self._command, signal.SIGKILL), stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def client(self, **options: Any) -> redis.Redis:
        return self.client_of(self.port, **options)

    @staticmethod
    def client_of(port: int, **options: Any) -> redis.Redis:
        return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), socket_timeout=1, decode_responses=True, **options)


class FailoverRedis(ABC):
    """Servers of which one at a time is the queue's master.

    Args:
        folder: of their data, a new one.
        replicas: of that master.
    """

    prefix: str
    database: int

    def __init__(self, folder: Path, replicas: int = 2) -> None:
        self._resources = ExitStack()
        self.servers: list[Server] = []
        try:
            self._start(folder, replicas)
            wait(lambda: self.replicas() == replicas)
        except BaseException:
            self.stop()
            raise

    @abstractmethod
    def _start(self, folder: Path, replicas: int) -> None: ...

    @property
    @abstractmethod
    def url(self) -> str: ...

    def _add(self, folder: Path, port: int, *options: str, sentinel: str | None = None) -> Server:
        server = Server(folder, port, *options, sentinel=sentinel)
        self._resources.callback(server.kill)
        return server

    def _client(self, server: Server) -> redis.Redis:
        return server.client(username=USER, password=PASSWORD)

    def master(self) -> Server | None:
        """Return the server that takes the queue's writes; of several the one with most replicas, others are old."""
        found = [(self._connected(server), server) for server in self.servers]
        masters = [(count, server) for count, server in found if count is not None]
        return max(masters, key=lambda pair: pair[0])[1] if masters else None

    def replicas(self) -> int:
        """Return how many replicas the master has."""
        master = self.master()
        return self._connected(master) or 0 if master else 0

    def _connected(self, server: Server) -> int | None:
        """Return how many replicas a server has; None if it is no master of the queue, or dead."""
        with suppress(RedisError, OSError), self._client(server) as client:
            info: Any = client.info("replication")
            if info["role"] == "master" and self._has_queue(client):
                return sum(info[f"slave{n}"]["state"] == "online" for n in range(info["connected_slaves"]))
        return None

    def _has_queue(self, client: redis.Redis) -> bool:
        return True

    def kill_master(self) -> Server:
        """Kill the master and return it."""
        master = self.master()
        assert master is not None
        master.kill()
        return master

    def replace_master(self) -> Server:
        """Freeze the master until another is elected, and return that; the old one learns of it later."""
        old = self.master()
        assert old is not None
        old.signal(signal.SIGSTOP)
        try:
            wait(lambda: self.master() not in (None, old) and self.replicas() > 0)
        finally:
            old.signal(signal.SIGCONT)
        master = self.master()
        assert master is not None
        return master

    def clear(self) -> None:
        """Delete all keys."""
        master = self.master()
        assert master is not None
        self._client(master).flushall()

    def has_job(self, server: Server, job_id: str) -> bool:
        """Return whether a server has the record of a job."""
        with self._client(server) as client:
            client.select(self.database)
            return bool(client.exists(f"{self.prefix}:job:{job_id}"))

    def await_replica(self, server: Server) -> None:
        """Return when a server that was killed and started again is a replica that has the master's data."""
        wait(lambda: self._join(server))
        count = len(self.replicas_of_queue())
        wait(lambda: self.replicas() == count)

    @abstractmethod
    def _join(self, server: Server) -> Any: ...

    @abstractmethod
    def replicas_of_queue(self) -> list[Server]:
        """Return the servers that are replicas of the master."""

    # What a test stack asks of its Redis.

    @property
    def alive(self) -> bool:
        return self.master() is not None

    def answers(self) -> bool:
        return self.alive

    def stop(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class SentinelRedis(FailoverRedis):
    """A master and its replicas under three Sentinels; all ask for a password."""

    prefix, database = "glimmer", 2

    def _start(self, folder: Path, replicas: int) -> None:
        first, *others = free_ports(1 + replicas)
        common = (*_COMMON, "--masterauth", PASSWORD, "--masteruser", USER, *_USERS)
        self.servers.append(self._add(folder / "0", first, *common))
        for number, port in enumerate(others, 1):
            replica = self._add(folder / str(number), port, *common)
            self.servers.append(replica)
            # Not an option of its start: it may be the master by then, and has to come back as that.
            wait(lambda replica=replica: self._client(replica).execute_command("REPLICAOF", "127.0.0.1", first))
        wait(lambda: self.replicas() == replicas)
        self.sentinels = free_ports(3)
        config = f"""
            sentinel monitor {NAME} 127.0.0.1 {first} 2
            sentinel auth-user {NAME} {USER}
            sentinel auth-pass {NAME} {PASSWORD}
            sentinel down-after-milliseconds {NAME} {NODE_TIMEOUT_MS}
            sentinel failover-timeout {NAME} 4000
            sentinel parallel-syncs {NAME} 2
            requirepass of-sentinels
            sentinel sentinel-pass of-sentinels
        """
        config = "\n".join(line.strip() for line in config.splitlines())
        started = [
            self._add(folder / f"sentinel-{number}", port, sentinel=config)
            for number, port in enumerate(self.sentinels)
        ]
        wait(lambda: all(self._sees(server, replicas) for server in started))

    def _sees(self, sentinel: Server, replicas: int) -> bool:
        with sentinel.client(password="of-sentinels") as client:
            state: Any = client.sentinel_master(NAME)
            return state["num-other-sentinels"] == 2 and state["num-slaves"] == replicas

    def _join(self, server: Server) -> Any:
        """Do at once what Sentinels do after ten seconds."""
        master = self.master()
        return master and self._client(server).execute_command("REPLICAOF", "127.0.0.1", master.port)

    def replicas_of_queue(self) -> list[Server]:
        master = self.master()
        return [server for server in self.servers if server is not master]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        return (
            f"redis+sentinel://{USER}:{PASSWORD_IN_URL}@{hosts}/{NAME}/{self.database}?sentinel_password=of-sentinels"
        )


class ClusterRedis(FailoverRedis):
    """Three masters with a third of the slots each; that of the queue has replicas."""

    prefix, database = CLUSTER_PREFIX, 0

    def _start(self, folder: Path, replicas: int) -> None:
        ports = free_ports(3 + replicas)
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
        options += ("--cluster-replica-validity-factor", "0")  # on a busy machine an election takes several tries
        options += ("--cluster-migration-barrier", "9")  # replicas stay with the queue's master
        options += ("--masterauth", PASSWORD, "--masteruser", USER, *_USERS)
        for number, port in enumerate(ports):
            self.servers.append(self._add(folder / str(number), port, *_COMMON, *options))
        wait(lambda: all(self._client(server).ping() for server in self.servers))
        for server in self.servers[1:]:
            self._client(self.servers[0]).execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        for number, server in enumerate(self.servers[:3]):
            slots = range(number * CLUSTER_SLOTS // 3, (number + 1) * CLUSTER_SLOTS // 3)
            self._client(server).execute_command("CLUSTER ADDSLOTS", *slots)
        wait(lambda: all(self._knows(server) == len(ports) for server in self.servers))
        owner = self.servers[3 * key_slot(CLUSTER_PREFIX.encode()) // CLUSTER_SLOTS]
        owner_id = self._client(owner).execute_command("CLUSTER MYID")
        for server in self.servers[3:]:
            wait(lambda server=server: self._client(server).execute_command("CLUSTER REPLICATE", owner_id))
        wait(lambda: all(self._is_ok(server) for server in self.servers))

    def _knows(self, server: Server) -> int:
        return int(self._info(server)["cluster_known_nodes"])

    def _is_ok(self, server: Server) -> bool:
        return self._info(server)["cluster_state"] == "ok"

    def _info(self, server: Server) -> Any:
        return self._client(server).cluster("INFO")

    def _has_queue(self, client: redis.Redis) -> bool:
        try:
            client.exists(f"{CLUSTER_PREFIX}:waiting")
        except RedisError:  # MOVED, or the cluster is down
            return False
        return True

    def _join(self, server: Server) -> Any:
        """Wait until the cluster has told it."""
        return self._client(server).info("replication")["role"] == "slave"

    def replicas_of_queue(self) -> list[Server]:
        roles: list[Any] = [self._client(server).info("replication")["role"] for server in self.servers]
        return [server for server, role in zip(self.servers, roles, strict=True) if role == "slave"]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"redis+cluster://{USER}:{PASSWORD_IN_URL}@{hosts}"


_COMMON = ("--save", "", "--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0")
_COMMON += ("--repl-diskless-sync", "yes")
_USERS = ("--user", "default", "off", "--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")


def wait(condition: Callable[[], Any]) -> None:
    """Return when the condition holds; errors of servers that are not ready count as no."""
    give_up_at = time.monotonic() + START_S
    while True:
        with suppress(RedisError, OSError):
            if condition():
                return
        assert time.monotonic() < give_up_at, "the servers do not get ready"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Return ports that are free, with the bus ports of cluster nodes, which are 10000 higher.

    None is of the range from which clients get theirs: while a server is dead, one of them might take its port.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(10_000, 20_000)
            with suppress(OSError):
                for number in (port, port + 10_000):
                    stack.enter_context(socket.create_server(("127.0.0.1", number)))
                ports.append(port)
        return ports
