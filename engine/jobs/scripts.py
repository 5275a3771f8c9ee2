"""Lua scripts: every read or write in Redis that must be atomic."""

import functools
from importlib.resources import files
from typing import Any

import orjson
import redis.asyncio

from engine.jobs.connection import redis_errors

Argument = str | int | bool | None | list[str] | list[tuple[str, int]]


class LuaScripts:
    """The scripts `lua/*.lua` of a package, each behind the package's `prelude.lua`.

    Args:
        package: name of the package whose `lua` folder holds the scripts.
        common: arguments of every call.
    """

    def __init__(self, redis: redis.asyncio.Redis, package: str, **common: Argument) -> None:
        self._scripts = {name: redis.register_script(script) for name, script in _read(package).items()}
        self._common = common

    async def run(self, script: str, /, *blobs: str | bytes, **arguments: Argument) -> Any:
        """Run `{script}.lua`.

        Args:
            blobs: ARGV[2] and on, stored byte for byte.
            arguments: with the common ones, the fields of the JSON object in ARGV[1]. None is left out, which Lua
                reads as nil. Integers are exact up to 2^53.

        Raises:
            QueueUnavailable: Redis is away or refuses writes.
        """
        scalars = {name: value for name, value in (self._common | arguments).items() if value is not None}
        with redis_errors():
            return await self._scripts[script](args=[orjson.dumps(scalars), *blobs])


@functools.cache
def _read(package: str) -> dict[str, str]:
    """Return the scripts of a package by name."""
    texts = {path.name: path.read_text("utf-8") for path in (files(package) / "lua").iterdir()}
    prelude = texts.pop("prelude.lua")
    return {name.removesuffix(".lua"): f"{prelude}\n{text}" for name, text in texts.items()}
