"""`glimmer health`: the probe of a container, run every few seconds, so it imports little."""

import asyncio
import json
import socket
from http.client import HTTPConnection, HTTPException
from typing import Annotated

import typer

from server.cli.options import stop, variable
from server.settings import ServerSettings

PROBE_TIMEOUT_S = 3.0

_LISTENS_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_HEALTHY = frozenset({"starting", "ready", "draining"})  # not "stuck": its device does not return from a step


def health(
    engine_id: Annotated[
        str | None, typer.Argument(envvar=variable("engine_id"), help="Id of the engine; any of this host when unset.")
    ] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Look for an engine's heartbeat in Redis instead.")] = False,
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask whether a request sent now would be served (GET /health).")
    ] = False,
    host: Annotated[
        str, typer.Option(envvar=variable("host"), help="Address that the API listens on.")
    ] = ServerSettings.model_fields["host"].default,
    port: Annotated[
        int, typer.Option(envvar=variable("port"), help="Port that the API listens on.")
    ] = ServerSettings.model_fields["port"].default,
    redis_url: Annotated[
        str | None, typer.Option(envvar=variable("redis_url"), help="Redis of the engine, for --engine.")
    ] = None,
) -> None:
    """Check whether an API answers (GET /live): exit with 0, or with 1 and one line that says why not."""
    if engine:
        problem = asyncio.run(_engine_problem(redis_url, engine_id))
    else:
        problem = _api_problem(_LISTENS_EVERYWHERE.get(host, host), port, "/health" if ready else "/live")
    if problem is not None:
        stop(problem, 1)


def _api_problem(host: str, port: int, path: str) -> str | None:
    """Ask the API itself; `http.client` uses no proxy from the environment."""
    connection = HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status == 200:
            return None
        return f"GET {path} answered {response.status}{_reason(response.read())}"
    except (OSError, HTTPException) as error:
        return f"GET {path} failed: {str(error) or type(error).__name__}"
    finally:
        connection.close()


def _reason(body: bytes) -> str:
    try:
        return f" ({json.loads(body)['reason']})"
    except (ValueError, KeyError, TypeError):
        return ""


async def _engine_problem(redis_url: str | None, engine_id: str | None) -> str | None:
    """Look for heartbeats. Without one the process is dead, frozen or cut off from Redis."""
    from engine.errors import QueueUnavailable
    from engine.jobs.connection import connect
    from engine.jobs.producer import JobProducer

    if redis_url is None:
        return "health --engine needs a Redis: set --redis-url or GLIMMER_REDIS_URL"
    client = connect(redis_url)
    queue = JobProducer(client)
    try:
        engines = await queue.engines()
    except QueueUnavailable as error:
        return str(error)
    finally:
        await queue.close()
        await client.aclose()
    prefix = f"{socket.gethostname()}-"
    states = [found.state for found in engines if (found.id == engine_id if engine_id else found.id.startswith(prefix))]
    if not states:
        return f"no heartbeat from {f'engine {engine_id}' if engine_id else 'an engine of this host'}"
    if not _HEALTHY.issuperset(states):
        return f"the engine is {', '.join(states)}"
    return None
