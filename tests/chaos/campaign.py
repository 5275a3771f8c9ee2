"""All scenarios by name, in the order of a full campaign."""

import asyncio
import signal
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.chaos import attacks, deaths, failover, scenarios, stages, traffic
from tests.chaos.report import Figure
from tests.chaos.sizes import Sizes

Scenario = Callable[[Path, int, Sizes], Coroutine[Any, Any, list[Figure]]]

SCENARIOS: dict[str, Scenario] = {
    "kills": scenarios.kills,
    "freezes": scenarios.freezes,
    "redis": scenarios.redis_kills,
    "failover": failover.failover,
    "flapping": scenarios.flapping,
    "random_kills": deaths.random_kills,
    "poison": deaths.poison,
    "hang": deaths.hang,
    "oom": deaths.oom,
    "leavers": traffic.leavers,
    "overload": traffic.overload,
    "rolling": traffic.rolling,
    "stages": stages.stages,
    "slow_clients": attacks.slow_clients,
    "hostile": attacks.hostile,
    "everything": scenarios.everything,
}


async def stoppable(work: Coroutine[Any, Any, list[Figure]]) -> list[Figure]:
    """Cancel the work on SIGTERM, so that it ends the processes it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def run(name: str, folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Run one scenario, with logs and journals in `folder`; an exception becomes a figure that misses its goal."""
    try:
        return asyncio.run(stoppable(SCENARIOS[name](folder, seed, sizes)))
    except Exception as error:
        traceback.print_exc()
        return [Figure(name, "exception", f"{type(error).__name__}: {error}", "none", False)]
