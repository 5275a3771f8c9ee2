"""API keys: the callers and their limits.

The file of `--api-keys` is TOML, one table per key, which `glimmer key NAME` prints:

    [alice]
    sha256 = "..."
    max_concurrent = 4  # limits are optional

Plain SHA-256 is enough: a random token of 256 bits cannot be guessed, and a slow hash would slow every request, which
is compared with all keys.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.observability.logs import event
from server.settings import ServerSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # part of Redis keys
POLL_INTERVAL_S = 1.0

logger = logging.getLogger("glimmer.keys")

Count = Annotated[int, Field(ge=1, le=2**53 - 1)]  # Lua numbers are exact up to here


class KeyFileError(ValueError):
    """The key file is not valid."""


@dataclass(frozen=True)
class Caller:
    """The owner of an API key. None means unlimited.

    Args:
        owner: name in the key file; empty without keys.
        max_concurrent: jobs waiting and running.
        requests_per_minute: jobs submitted within any 60 seconds.
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
    """Return the TOML table of a new key, its limits commented out."""
    return f"""
[{name}]
sha256 = "{hash_key(key).hex()}"
# max_concurrent = 4
# requests_per_minute = 60
# pixel_steps_per_day = 50_000_000_000  # one 1024 x 1024 image in 50 steps takes 52_428_800"""


def parse_key_file(text: str) -> dict[bytes, Caller]:
    """Return the callers by key hash; raise a `KeyFileError` that names the invalid entry, never a hash."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
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

    A changed file is read again. If invalid, the old keys stay: a typo must not lock out all callers.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.open_to_all = not settings.asks_for_keys
        key, self._path = settings.api_key, settings.api_keys_file
        self._fixed = {hash_key(key.get_secret_value()): API_KEY_CALLER} if key else {}
        self._checked_at = time.monotonic()
        self._version = _version_of(self._path) if self._path else None
        self._from_file = _read(self._path) if self._path else {}

    def find(self, key: str) -> Caller | None:
        """Return the caller with this key, in constant time."""
        self._reload_if_changed()
        digest, found = hash_key(key), None
        for known, caller in (*self._fixed.items(), *self._from_file.items()):
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked_at < POLL_INTERVAL_S:
            return
        self._checked_at = now
        version = _version_of(self._path)
        if version == self._version:
            return
        self._version = version  # also if invalid: logged once
        try:
            self._from_file = _read(self._path)
            event(logger, "keys_read", keys=len(self._from_file))
        except KeyFileError as error:
            event(logger, "keys_not_read", logging.ERROR, reason=error)


def _version_of(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> dict[bytes, Caller]:
    try:
        return parse_key_file(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
