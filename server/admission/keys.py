"""API keys, callers and limits.

The file of `--api-keys` is TOML, one table per key, as `glimmer key NAME` prints it.

Plain SHA-256 is enough: random tokens of 256 bits cannot be guessed. A slow hash would slow every request. The time of
a look-up tells nothing: nobody can choose digests near a known one.
"""

import asyncio
import hashlib
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import StartError
from engine.observability.logs import event, where
from server.settings import ServerSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # part of Redis keys
POLL_INTERVAL_S = 0.5
SETTLE_S = 2.0  # a changed file counts once unchanged for so long
CUT_OFF_S = 10.0  # if it lacks keys or limits
START_INTERVAL_S, START_LOOKS = 1.0, 5
MAX_FILE_BYTES = 4 * 2**20

logger = logging.getLogger("glimmer.keys")

Count = Annotated[int, Field(ge=1, le=2**53 - 1)]  # Lua numbers are exact up to here


class KeyFileError(StartError):
    """The key file is not valid."""


@dataclass(frozen=True)
class Caller:
    """The owner of an API key. None means unlimited.

    Args:
        owner: name in the key file; empty without keys.
        max_concurrent: jobs waiting and running.
        requests_per_minute: within any 60 seconds.
        pixel_steps_per_day: width * height * steps * n, summed over a day (UTC).
    """

    owner: str
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    pixel_steps_per_day: int | None = None


ANONYMOUS = Caller("")
API_KEY_CALLER = Caller("--api-key")  # not a valid name in a key file


class _KeyTable(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    max_concurrent: Count | None = None
    # Redis stores the requests of a minute one by one.
    requests_per_minute: Annotated[int, Field(ge=1, le=100_000)] | None = None
    pixel_steps_per_day: Count | None = None


_ACCEPTED = {
    "sha256": "the 64 lower-case hexadecimal digits that `glimmer key NAME` prints",
    "requests_per_minute": "a whole number, 1..100000",
    "max_concurrent": "a whole number above 0",
    "pixel_steps_per_day": "a whole number above 0",
}


def new_key() -> str:
    """Return a random key."""
    return f"glm-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> bytes:
    """Return the stored form of a key."""
    return hashlib.sha256(key.encode()).digest()


def key_table(name: str, key: str) -> str:
    """Return a new key's TOML table, its limits commented out."""
    return f"""
[{name}]
sha256 = "{hash_key(key).hex()}"
# max_concurrent = 4
# requests_per_minute = 60
# pixel_steps_per_day = 50_000_000_000  # one 1024 x 1024 image in 50 steps takes 52_428_800"""


def parse_key_file(text: str) -> dict[bytes, Caller]:
    """Return the callers by key hash; raise a `KeyFileError` that names the invalid entry."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError for a number of 5,000 digits
        raise KeyFileError(f"not valid TOML: {error}") from None
    callers: dict[bytes, Caller] = {}
    for name, table in tables.items():
        sha256, caller = _read_table(name, table)
        if sha256 in callers:
            raise KeyFileError(f"[{name}] has the same key as [{callers[sha256].owner}]; create one for each")
        callers[sha256] = caller
    return callers


def _read_table(name: str, table: object) -> tuple[bytes, Caller]:
    if not NAME.fullmatch(name):
        raise KeyFileError(f"[{name}]: a name has 1..64 letters, digits, - and _, and starts with a letter or a digit")
    try:
        entry = _KeyTable.model_validate(table)
    except ValidationError as error:
        field = str((*error.errors()[0]["loc"], "")[0])
        if field not in _ACCEPTED:
            raise KeyFileError(f"[{name}] must be a table of {', '.join(_KeyTable.model_fields)}") from None
        raise KeyFileError(f"{field} of [{name}] must be {_ACCEPTED[field]}") from None
    return bytes.fromhex(entry.sha256), Caller(name, **entry.model_dump(exclude={"sha256"}))


class KeyRing:
    """The known keys; a `KeyFileError` if the file is invalid at the start.

    A later version counts once it is valid and unchanged for some seconds.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.open_to_all = not settings.asks_for_keys
        key, self._path = settings.api_key, settings.api_keys_file
        self._fixed = {hash_key(key.get_secret_value()): API_KEY_CALLER} if key else {}
        self._from_file: dict[bytes, Caller] = {}
        self._clock = clock
        if self._path is not None:
            self._taken = self._seen = _settled_version(self._path)
            self._seen_at = clock()
            self._from_file = _read(self._path)[0]

    def find(self, key: str) -> Caller | None:
        """Return the caller with this key."""
        digest = hash_key(key)
        return self._from_file.get(digest) or self._fixed.get(digest)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """Follow the file, on a thread: its disk may hang."""
        task = asyncio.create_task(self._look_forever()) if self._path else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:  # else keys that are revoked later would stay valid
                event(logger, "keys_not_read", logging.ERROR, reason=type(error).__name__, where=where(error))
                await asyncio.sleep(CUT_OFF_S)

    def look(self) -> None:
        """Read the file if it has changed and is complete."""
        assert self._path is not None
        version, now = _version_of(self._path), self._clock()
        if version != self._seen:
            self._seen, self._seen_at = version, now
        age_s = now - self._seen_at
        if version == self._taken or age_s < SETTLE_S:
            return
        try:
            callers, text = _read(self._path)
            may_be_cut_off = _may_be_cut_off(callers, text, self._from_file)
            if not text.strip():
                raise KeyFileError(f"{self._path}: it is empty; to refuse all keys, write a comment into it")
        except KeyFileError as error:
            if age_s >= CUT_OFF_S:
                self._taken = version  # logged once
                event(logger, "keys_not_read", logging.ERROR, reason=error)
            return
        if (may_be_cut_off and age_s < CUT_OFF_S) or version != _version_of(self._path):
            return
        self._taken, self._from_file = version, callers
        event(logger, "keys_read", keys=len(callers))


def _may_be_cut_off(callers: dict[bytes, Caller], text: str, old: dict[bytes, Caller]) -> bool:
    """Return whether keys or limits are missing, as in a half-written file."""
    before = {caller.owner: caller for caller in old.values()}
    after = {caller.owner: caller for caller in callers.values()}
    if not text.endswith("\n") or not callers or not before.keys() <= after.keys():
        return True
    if any(_loses_a_limit(caller, after[owner]) for owner, caller in before.items()):
        return True
    last_key, last_caller = next(reversed(callers.items()))
    return last_key not in old and None in astuple(last_caller)


def _loses_a_limit(old: Caller, new: Caller) -> bool:
    limits = zip(astuple(old), astuple(new), strict=True)
    return any(before is not None and after is None for before, after in limits)


def _settled_version(path: Path) -> object:
    """Return the file's version; wait some seconds for its writer."""
    version = _version_of(path)
    for _ in range(START_LOOKS):
        status = path.stat() if version else None
        if status is None or abs(time.time() - status.st_mtime) > START_INTERVAL_S:
            break
        time.sleep(START_INTERVAL_S)
        previous, version = version, _version_of(path)
        if version == previous:
            break
    return version


def _version_of(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> tuple[dict[bytes, Caller], str]:
    try:
        if not (path.is_file() or path.samefile(os.devnull)):
            raise KeyFileError("not a file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise KeyFileError(f"it has more than {MAX_FILE_BYTES} bytes")
        text = data.decode()
        return parse_key_file(text), text
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
