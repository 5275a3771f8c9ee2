"""All scenarios by name, in the order of a full campaign."""

import asyncio
import signal
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.chaos import scenarios, traffic
from tests.chaos.report import Figure
from tests.chaos.scenarios import Sizes

Scenario = Callable[[Path, int, Sizes], Coroutine[Any, Any, list[Figure]]]

SCENARIOS: dict[str, Scenario] = {
    "kills": scenarios.kills,
    "freezes": scenarios.freezes,
    "redis": scenarios.redis_kills,
    "poison": scenarios.poison,
    "hang": scenarios.hang,
    "leavers": traffic.leavers,
    "overload": traffic.overload,
    "rolling": traffic.rolling,
    "everything": scenarios.everything,
}


async def stoppable(work: Coroutine[Any, Any, list[Figure]]) -> list[Figure]:
    """Work that ends what it has started on SIGTERM, too."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def run(name: str, folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """One scenario, its logs and journals in `folder`. One that breaks off is a figure, too."""
    try:
        return asyncio.run(stoppable(SCENARIOS[name](folder, seed, sizes)))
    except Exception as error:
        traceback.print_exc()
        return [Figure(name, "broke off", f"{type(error).__name__}: {error}", "comes to its end", False)]
