import functools
from importlib.resources import files
from typing import Any

import orjson
import redis.asyncio

from engine.jobs.connection import redis_errors

Argument = str | int | float | bool | None | list[str] | list[tuple[str, int]]


class LuaScripts:
    """The scripts `lua/*.lua` of a package, behind `prelude*.lua`; every call gets `common`."""

    def __init__(self, redis: redis.asyncio.Redis, package: str, **common: Argument) -> None:
        self._scripts = {name: redis.register_script(script) for name, script in _read(package).items()}
        self._common = common

    async def run(self, script: str, /, *blobs: str | bytes, **arguments: Argument) -> Any:
        """Run `{script}.lua` with `arguments` (integers up to 2^53) as ARGV[1], then `blobs`."""
        scalars = {name: value for name, value in (self._common | arguments).items() if value is not None}
        with redis_errors():
            return await self._scripts[script](args=[orjson.dumps(scalars), *blobs])


@functools.cache
def _read(package: str) -> dict[str, str]:
    texts = {path.name: path.read_text("utf-8") for path in (files(package) / "lua").iterdir()}
    prelude = "\n".join(texts.pop(name) for name in sorted(texts) if name.startswith("prelude"))
    return {name.removesuffix(".lua"): f"{prelude}\n{text}" for name, text in texts.items()}
