"""A look at Redis before a process starts."""

import asyncio
import ssl

from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    InvalidResponse,
    RedisError,
)

from engine.errors import StartError
from engine.jobs.connection import connect
from engine.jobs.masters import CLUSTER_PREFIX, key_prefix

CHECK_TIMEOUT_S = 2.0
OLDEST = (6, 2)  # XPENDING with IDLE

# Texts of errors that waiting does not mend; redis-py has no classes for them.
_SETTING_ERRORS = {
    "DB index": "has no database of that number",
    "SELECT is not allowed": "is a cluster; write redis+cluster:// for redis://",
    "cluster support disabled": "is not a cluster; write redis:// for redis+cluster://",
    "command 'SENTINEL'": "is not a Sentinel",
    "command `SENTINEL`": "is not a Sentinel",
    "unknown command": "is older than 6.2, or is not Redis",
    "AF_UNIX path too long": "cannot be reached: the path of a socket has at most 107 bytes",
    "'idna' codec": "cannot be reached: its host name is not valid",
}
_PASSWORD_CODES = ("WRONGPASS", "NOAUTH", "HELLO must be called with the client already authenticated")
_TLS_ERRORS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")


async def check_redis(url: str) -> None:
    """Raise `StartError` for a server that answers but can never hold the queue; one that is away may come back."""
    client = connect(url)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            server = await client.info("server")
    except (RedisError, OSError, TimeoutError) as error:
        if problem := _problem(error):
            raise StartError(f"GLIMMER_REDIS_URL: the server there {problem}") from None
        return
    finally:
        await client.aclose()
    version = str(server.get("redis_version", ""))
    mode = server.get("redis_mode")
    if mode == "sentinel":
        raise StartError(
            "GLIMMER_REDIS_URL: the server there is a Sentinel; write redis+sentinel://HOST/NAME-OF-MASTER"
        )
    if mode == "cluster" and key_prefix(client) != CLUSTER_PREFIX:
        raise StartError("GLIMMER_REDIS_URL: the server there is a cluster; write redis+cluster:// for redis://")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers and numbers < OLDEST:
        raise StartError(f"GLIMMER_REDIS_URL: the server there is Redis {version}; 6.2 or newer is needed")


def _problem(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, AuthenticationError | AuthorizationError | AuthenticationWrongNumberOfArgsError) or any(
        code in text for code in _PASSWORD_CODES
    ):
        return "refuses the user or password; write them as in redis://user:password@host:6379/0"
    if isinstance(error, InvalidResponse):
        return "is not Redis"
    problems = (problem for start, problem in _SETTING_ERRORS.items() if start in text)
    return next(problems, next((f"cannot be trusted ({reason})" for reason in _tls_reasons(error)), None))


def _tls_reasons(error: BaseException | None) -> list[str]:
    """Return the TLS errors that caused an error and that waiting does not mend."""
    reasons = []
    while error is not None:
        if isinstance(error, ssl.SSLError) and error.reason in _TLS_ERRORS:
            reasons.append(error.reason)
        error = error.__cause__ or error.__context__
    return reasons
