"""The contents of Redis, to check that nothing is left at the end."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio

from engine.jobs.masters import key_prefix

PREFIX = "glimmer"
QUEUES = ("queue:interactive", "queue:batch", "queue:render:interactive", "queue:render:batch")
STAYS = frozenset(("counters", "engines", "last_engine", *QUEUES))
LONGEST_TTL_S = 3600 + 600  # of an idempotency key: its job's timeout plus the time results are kept
HANDED_BACK = "handed-back"  # a consumer of the groups that is no engine


@dataclass
class RedisContents:
    """Counts of jobs and keys.

    Args:
        waiting, running: what admission counts.
        entries, pending: of all streams.
        consumers: engines that the groups know, alive or not.
        without_end: keys that never expire.
        kinds: number of keys by kind, the word after the prefix.
        blob_bytes: memory of results and partial images.
    """

    waiting: int = 0
    running: int = 0
    entries: int = 0
    pending: int = 0
    consumers: set[str] = field(default_factory=set)
    without_end: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    results: set[str] = field(default_factory=set)
    blob_bytes: int = 0

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self.entries or self.pending)

    @classmethod
    async def read(cls, client: redis.asyncio.Redis) -> "RedisContents":
        prefix = key_prefix(client)
        found = cls(
            waiting=await client.zcard(f"{prefix}:waiting"),
            running=await client.scard(f"{prefix}:running"),  # type: ignore[misc]
        )
        for queue in QUEUES:
            await found._count_queue(client, f"{prefix}:{queue}")
        async for key in client.scan_iter(f"{prefix}:*", count=500):
            await found._count_key(client, key.decode(), prefix)
        return found

    async def _count_queue(self, client: redis.asyncio.Redis, queue: str) -> None:
        self.entries += await client.xlen(queue)
        groups: list[dict[str, Any]] = await client.xinfo_groups(queue) if await client.exists(queue) else []
        for group in groups:
            self.pending += group["pending"]
            names = {consumer["name"].decode() for consumer in await client.xinfo_consumers(queue, group["name"])}
            self.consumers |= names - {HANDED_BACK}

    async def _count_key(self, client: redis.asyncio.Redis, key: str, prefix: str) -> None:
        kind, _, name = key.removeprefix(f"{prefix}:").partition(":")
        self.kinds[kind] += 1
        if kind in ("result", "partials"):
            self.blob_bytes += await client.memory_usage(key) or 0
        if kind == "result":
            self.results.add(name)
        ttl_ms = await client.pttl(key)
        if key.removeprefix(f"{prefix}:") not in STAYS and (ttl_ms == -1 or ttl_ms > 1000 * LONGEST_TTL_S):
            self.without_end.append(key)
