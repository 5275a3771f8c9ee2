"""Limits within any 60 seconds and within a day (UTC), counted in Redis for all APIs."""

import math
import secrets
from dataclasses import dataclass, field, replace

from engine.jobs.producer import JobProducer
from engine.jobs.scripts import LuaScripts
from server.admission.keys import ANONYMOUS, Caller
from server.errors import ApiError, too_many


@dataclass
class Charge:
    """A caller's charge for a job.

    Args:
        headers: `x-ratelimit-*` of the response; empty without a request limit.
        ticket, day: for `refund`; an empty ticket is no charge.
        worked: images were decoded or the rewriter called: counts even if the request fails.
        rest: charged later.
    """

    caller: Caller
    pixel_steps: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ticket: str = ""
    day: int = 0
    worked: bool = False
    rest: "Charge | None" = None

    def work(self) -> None:
        """Record that expensive work begins."""
        self.worked = True


NO_CHARGE = Charge(ANONYMOUS)


class RateLimits:
    """The limits of all keys. Methods raise `QueueUnavailable`."""

    def __init__(self, queue: JobProducer) -> None:
        self._scripts = LuaScripts(queue.client, "server.admission", prefix=queue.prefix)

    async def charge(self, caller: Caller, pixel_steps: int) -> Charge:
        """Count a job against the caller's limits.

        Raises:
            ApiError: 429 above one; nothing is counted.
        """
        return await self._charge(caller, pixel_steps)

    async def top_up(self, charge: Charge, pixel_steps: int) -> None:
        """Count the rest of a job's `pixel_steps`. Raises as `charge`."""
        caller = replace(charge.caller, requests_per_minute=None)
        charge.rest = await self._charge(caller, pixel_steps - charge.pixel_steps, already=charge.pixel_steps)

    async def _charge(self, caller: Caller, pixel_steps: int, already: int = 0) -> Charge:
        if caller.requests_per_minute is None and caller.pixel_steps_per_day is None:
            return Charge(caller)
        ticket = secrets.token_hex(8)
        exceeded, left, next_ms, reset_ms, charged, day, day_left_ms = await self._scripts.run(
            "charge",
            owner=caller.owner,
            ticket=ticket,
            pixel_steps=pixel_steps,
            per_minute=caller.requests_per_minute,
            per_day=caller.pixel_steps_per_day,
        )
        headers = _headers(caller, left, reset_ms)
        if exceeded == b"rate":
            raise _rate_exceeded(caller, next_ms, headers)
        if exceeded == b"quota":
            raise _quota_exceeded(caller, pixel_steps + already, charged - already, day_left_ms, headers)
        return Charge(caller, pixel_steps, headers, ticket, day)

    async def refund(self, charge: Charge) -> None:
        """Take a charge back; after work, only the pixel-steps."""
        if charge.rest is not None:
            await self.refund(charge.rest)
        if charge.ticket:
            await self._scripts.run(
                "refund",
                owner=charge.caller.owner,
                ticket=charge.ticket,
                pixel_steps=charge.pixel_steps,
                day=charge.day,
                keep_request=charge.worked,
            )


def _headers(caller: Caller, left: int, reset_ms: int) -> dict[str, str]:
    if caller.requests_per_minute is None:
        return {}
    return {
        "x-ratelimit-limit-requests": str(caller.requests_per_minute),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": f"{math.ceil(reset_ms / 1000)}s",
    }


def _rate_exceeded(caller: Caller, next_ms: int, headers: dict[str, str]) -> ApiError:
    wait_s = max(1, math.ceil(next_ms / 1000))
    message = f"This key may send {caller.requests_per_minute} requests a minute; try again in {wait_s} s."
    return too_many(message, wait_s, headers=headers)


def _quota_exceeded(
    caller: Caller, pixel_steps: int, charged: int, day_left_ms: int, headers: dict[str, str]
) -> ApiError:
    hours, minutes = divmod(math.ceil(day_left_ms / 60_000), 60)
    return ApiError(
        429,
        f"This key may use {caller.pixel_steps_per_day} pixel-steps a day (width * height * steps * n) and has used "
        f"{charged}; this request needs {pixel_steps}. The day ends in {hours} h {minutes} min.",
        type="insufficient_quota",
        code="insufficient_quota",
        headers={**headers, "x-should-retry": "false"},
    )
