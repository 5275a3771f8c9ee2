"""`glimmer health`: the probe of a container, run every few seconds, so it imports little."""

import json
from http.client import HTTPConnection, HTTPException
from typing import Annotated

import typer

from server.cli.options import stop, variable
from server.settings import ServerSettings

PROBE_TIMEOUT_S = 3.0

_LISTENS_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def health(
    engine_id: Annotated[
        str | None, typer.Argument(envvar=variable("engine_id"), help="Id of the engine; all of this host when unset.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Check the engines of this host instead; asks no Redis.")
    ] = False,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready",
            help="Ask whether a request sent now would be served (GET /health); with --engine, whether its checkpoint "
            "is loaded and it takes jobs.",
        ),
    ] = False,
    host: Annotated[
        str, typer.Option(envvar=variable("host"), help="Address that the API listens on.")
    ] = ServerSettings.model_fields["host"].default,
    port: Annotated[
        int, typer.Option(envvar=variable("port"), help="Port that the API listens on.")
    ] = ServerSettings.model_fields["port"].default,
    redis_url: Annotated[str | None, typer.Option(hidden=True, help="Without effect; older versions asked it.")] = None,
) -> None:
    """Check whether an API answers (GET /live): exit with 0, or with 1 and one line that says why not."""
    if engine:
        problem = _engine_problem(engine_id, must_be_ready=ready)
    else:
        problem = _api_problem(_LISTENS_EVERYWHERE.get(host, host), port, "/health" if ready else "/live")
    if problem is not None:
        stop(problem, 1)


def _api_problem(host: str, port: int, path: str) -> str | None:
    """Ask the API itself; `http.client` uses no proxy from the environment."""
    connection = None
    try:
        connection = HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status == 200:
            return None
        return f"GET {path} answered {response.status}{_reason(response.read())}"
    except (OSError, HTTPException, ValueError) as error:
        return f"GET {path} failed: {str(error) or type(error).__name__}"
    finally:
        if connection is not None:
            connection.close()


def _reason(body: bytes) -> str:
    try:
        return f" ({json.loads(body)['reason']})"
    except (ValueError, KeyError, TypeError):
        return ""


def _engine_problem(engine_id: str | None, *, must_be_ready: bool) -> str | None:
    """Look at this machine's status files: a Redis outage must not get engines restarted."""
    from engine.worker.status import MAX_AGE_S, read_statuses, status_folder

    try:
        living = [status for status in read_statuses() if status.is_alive and engine_id in (None, status.id)]
    except OSError as error:
        return f"cannot look for engines: {error}"
    if not living:
        return f"no sign of {f'engine {engine_id}' if engine_id else 'an engine'} in {status_folder()}"
    for status in living:
        if status.age_s > MAX_AGE_S:
            return f"engine {status.id} has not moved for {status.age_s:.0f} s"
        if status.state == "stuck":
            return f"engine {status.id} is stuck: its device does not return from a step"
        if must_be_ready and status.state != "ready":
            return f"engine {status.id} is {status.state}"
    return None
