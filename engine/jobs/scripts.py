import functools
from importlib.resources import files
from typing import Any

import orjson
import redis.asyncio
from redis.exceptions import NoScriptError

from engine.jobs.connection import redis_errors

Argument = str | int | float | bool | None | list[str] | list[tuple[str, int]]


REPLICATION_TIMEOUT_MS = 500


class LuaScripts:
    """The scripts `lua/*.lua` of a package, behind `prelude*.lua`; every call gets `prefix` and `common`."""

    def __init__(self, redis: redis.asyncio.Redis, package: str, *, prefix: str, **common: Argument) -> None:
        self._redis = redis
        self._scripts = {name: redis.register_script(script) for name, script in _read(package).items()}
        self._common: dict[str, Argument] = {"prefix": prefix, **common}
        # Named to a cluster's node, so that another than the keys' answers MOVED.
        self._keys = [f"{prefix}:waiting"] if "{" in prefix else []
        self._probe = f"{prefix}:probe"

    async def run(self, script: str, /, *blobs: str | bytes, **arguments: Argument) -> Any:
        """Run `{script}.lua` with `arguments` (integers up to 2^53) as ARGV[1], then `blobs`."""
        with redis_errors():
            return await self._scripts[script](keys=self._keys, args=self._arguments(blobs, arguments))

    async def run_replicated(self, script: str, replicas: int, /, *blobs: str | bytes, **arguments: Argument) -> Any:
        """Run a script; return its reply, and how many of `replicas` have what it wrote within the timeout.

        WAIT covers what the connection wrote last. With a write of its own, that covers earlier calls of others, too:
        the reply may be about theirs.
        """
        registered = self._scripts[script]
        call = (registered.sha, len(self._keys), *self._keys, *self._arguments(blobs, arguments))
        with redis_errors():
            reply, reached = await self._call_and_wait(call, replicas)
            if isinstance(reply, NoScriptError):
                await self._redis.script_load(registered.script)
                reply, reached = await self._call_and_wait(call, replicas)
            for answer in (reply, reached):
                if isinstance(answer, Exception):
                    raise answer
            return reply, reached

    async def _call_and_wait(self, call: tuple[Any, ...], replicas: int) -> tuple[Any, Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.evalsha(*call)
            pipe.set(self._probe, b"", px=1000)
            pipe.execute_command("WAIT", replicas, REPLICATION_TIMEOUT_MS)
            reply, _, reached = await pipe.execute(raise_on_error=False)
        return reply, reached

    def _arguments(self, blobs: tuple[str | bytes, ...], arguments: dict[str, Argument]) -> list[str | bytes]:
        scalars = {name: value for name, value in (self._common | arguments).items() if value is not None}
        return [orjson.dumps(scalars), *blobs]


@functools.cache
def _read(package: str) -> dict[str, str]:
    texts = {path.name: path.read_text("utf-8") for path in (files(package) / "lua").iterdir()}
    prelude = "\n".join(texts.pop(name) for name in sorted(texts) if name.startswith("prelude"))
    return {name.removesuffix(".lua"): f"{prelude}\n{text}" for name, text in texts.items()}
