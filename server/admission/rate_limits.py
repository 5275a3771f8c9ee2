"""What a key may use within a time, counted in Redis, so that all replicas of the API share it.

Two limits, both optional: jobs asked for within any 60 seconds, and pixel-steps within a day (UTC). How many jobs may
wait and run at once is the queue's to hold. Keys, behind the queue's prefix:

rate:{owner}         sorted set, one ticket per request, by its time; goes a minute after the last one
quota:{owner}:{day}  pixel-steps charged on that day, days since the epoch; goes when the day is over

All times are Redis' own. In each script that charges, the first write is one that Redis refuses when it is out of
memory, so a script is not stopped half way.
"""

import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from redis.commands.core import AsyncScript

from engine.jobs.connection import redis_errors
from engine.jobs.producer import JobProducer
from server.admission.keys import ANONYMOUS, Caller
from server.errors import ApiError

_PRELUDE = """
local PREFIX, owner, ticket, pixel_steps = unpack(ARGV)
local RATE, MINUTE_MS, DAY_MS = PREFIX .. ':rate:' .. owner, 60000, 86400000
local function quota_key(day) return PREFIX .. ':quota:' .. owner .. ':' .. day end
"""

# Limits are empty where there is none. -> [what stands in the way: '' | 'rate' | 'quota', requests left, ms until the
# oldest request of the minute counts no more, ms until all of them do, pixel-steps charged today before this, day, ms
# left of it]
CHARGE = (
    _PRELUDE
    + """
local per_minute, per_day = tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local day, day_left = math.floor(now / DAY_MS), DAY_MS - now % DAY_MS
local since, used, oldest, newest = '(' .. string.format('%.0f', now - MINUTE_MS), 0, now, now
if per_minute then
  used = redis.call('ZCOUNT', RATE, since, '+inf')
  local first = redis.call('ZRANGEBYSCORE', RATE, since, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local last = redis.call('ZREVRANGE', RATE, 0, 0, 'WITHSCORES')
  if used > 0 then oldest, newest = tonumber(first[2]), tonumber(last[2]) end
end
local charged = per_day and tonumber(redis.call('GET', quota_key(day)) or 0) or 0

local function answer(obstacle, left, newest)
  return {obstacle, left, oldest + MINUTE_MS - now, newest + MINUTE_MS - now, charged, day, day_left}
end
if per_minute and used >= per_minute then return answer('rate', 0, newest) end
if per_day and charged + tonumber(pixel_steps) > per_day then
  return answer('quota', per_minute and per_minute - used or 0, newest)
end

if per_minute then
  redis.call('ZADD', RATE, now, ticket)
  redis.call('ZREMRANGEBYSCORE', RATE, '-inf', string.format('%.0f', now - MINUTE_MS))
  redis.call('PEXPIRE', RATE, MINUTE_MS)
end
if per_day then
  redis.call('INCRBY', quota_key(day), pixel_steps)
  redis.call('PEXPIRE', quota_key(day), day_left)
end
return answer('', per_minute and per_minute - used - 1 or 0, now)
"""
)

REFUND = (
    _PRELUDE
    + """
local quota = quota_key(ARGV[5])
redis.call('ZREM', RATE, ticket)
local charged = tonumber(redis.call('GET', quota) or 0)
if charged > 0 then redis.call('DECRBY', quota, string.format('%.0f', math.min(charged, tonumber(pixel_steps)))) end
"""
)


@dataclass(frozen=True)
class Charge:
    """What a caller was charged for a job.

    Args:
        headers: `x-ratelimit-*`, for the answer; empty where no request rate is set.
        ticket, day: what `refund` needs; an empty ticket is a charge of nothing.
    """

    caller: Caller
    pixel_steps: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ticket: str = ""
    day: int = 0


NO_CHARGE = Charge(ANONYMOUS)


class RateLimits:
    """The limits of all keys. Methods raise `QueueUnavailable` when Redis is away."""

    def __init__(self, queue: JobProducer) -> None:
        self._prefix = queue.prefix
        self._charge = queue.client.register_script(CHARGE)
        self._refund = queue.client.register_script(REFUND)

    async def charge(self, caller: Caller, pixel_steps: int) -> Charge:
        """Counts a job against the caller's limits, or refuses it and counts nothing.

        Raises:
            ApiError: 429 when a limit is reached.
        """
        if caller.requests_per_minute is None and caller.pixel_steps_per_day is None:
            return Charge(caller)
        ticket = secrets.token_hex(8)
        limits = ("" if it is None else it for it in (caller.requests_per_minute, caller.pixel_steps_per_day))
        obstacle, left, next_ms, reset_ms, charged, day, day_left_ms = await self._run(
            self._charge, caller.owner, ticket, pixel_steps, *limits
        )
        headers = _headers(caller, left, reset_ms)
        if obstacle == b"rate":
            raise _too_fast(caller, next_ms, headers)
        if obstacle == b"quota":
            raise _used_up(caller, pixel_steps, charged, day_left_ms, headers)
        return Charge(caller, pixel_steps, headers, ticket, day)

    async def refund(self, charge: Charge) -> None:
        """Takes a charge back, whole, because no job came of it."""
        if charge.ticket:
            await self._run(self._refund, charge.caller.owner, charge.ticket, charge.pixel_steps, charge.day)

    async def _run(self, script: AsyncScript, *args: str | int) -> Any:
        with redis_errors():
            return await script(args=[self._prefix, *args])


def _headers(caller: Caller, left: int, reset_ms: int) -> dict[str, str]:
    if caller.requests_per_minute is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(caller.requests_per_minute),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": f"{math.ceil(reset_ms / 1000)}s",
    }


def _too_fast(caller: Caller, next_ms: int, headers: dict[str, str]) -> ApiError:
    wait_s = max(1, math.ceil(next_ms / 1000))
    return ApiError(
        429,
        f"This key may send {caller.requests_per_minute} requests a minute; try again in {wait_s} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={**headers, "retry-after": str(wait_s)},
    )


def _used_up(caller: Caller, wanted: int, charged: int, day_left_ms: int, headers: dict[str, str]) -> ApiError:
    hours, minutes = divmod(math.ceil(day_left_ms / 60_000), 60)
    return ApiError(
        429,
        f"This key may use {caller.pixel_steps_per_day} pixel-steps a day (width * height * steps * n) and has used "
        f"{charged}; this request needs {wanted}. The day ends in {hours} h {minutes} min.",
        type="insufficient_quota",
        code="insufficient_quota",
        headers={**headers, "x-should-retry": "false"},
    )
