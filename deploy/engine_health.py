"""The engine container's health check: does an engine of this container live, and does it move?

Exits with 0 if so. Otherwise it prints why not and exits with 1: no heartbeat (the process is dead or frozen, or cannot
reach Redis) or a device step that hangs. An engine that is still loading its checkpoint lives.
"""

import asyncio
import os
import socket
import sys

from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.producer import JobProducer

ALIVE = frozenset({"starting", "ready", "draining"})


async def states_here(redis_url: str) -> list[str]:
    """What the engines of this container say of themselves; their ids start with its host name."""
    client = connect(redis_url)
    queue = JobProducer(client)
    try:
        return [engine.state for engine in await queue.engines() if engine.id.startswith(f"{socket.gethostname()}-")]
    finally:
        await queue.close()
        await client.aclose()


def main() -> str | None:
    """What is wrong, or None."""
    try:
        states = asyncio.run(states_here(os.environ["GLIMMER_REDIS_URL"]))
    except QueueUnavailable as error:
        return str(error)
    if not states:
        return "no heartbeat from an engine of this container"
    if not ALIVE.issuperset(states):
        return f"the engine is {', '.join(states)}"
    return None


if __name__ == "__main__":
    sys.exit(main())
