"""Starting API, engines and Redis, and stopping them in order."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EXIT_CONFIGURATION
from engine.errors import QueueUnavailable
from engine.jobs.consumer import JobConsumer
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from engine.observability.tracing import TracingError
from server.addresses import is_loopback
from server.admission.engine_directory import ready_engines
from server.admission.keys import KeyFileError
from server.app import create_app
from server.processes.serving import DrainingServer, StartError, listen, url_of
from server.processes.supervisor import EngineMisconfigured, Supervisor, engine_environments
from server.services import open_queue
from server.settings import ServerSettings

ENGINE_COMMAND = (sys.executable, "-m", "server.cli", "engine")

START_ERRORS = (StartError, QueueUnavailable, KeyFileError, TracingError)
"""Raised by `run_api` and `run_all`, with a message for the user."""

REDIS_POLL_INTERVAL_S = 0.5

logger = logging.getLogger("glimmer.serve")


@dataclass(frozen=True)
class EngineProcesses:
    """The engines that `glimmer serve` starts.

    Args:
        data_dir: folder of the embedded Redis.
        environment: variables that override this process's.
    """

    count: int
    data_dir: Path
    device: str = "auto"
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ENGINE_COMMAND


def run_api(settings: ServerSettings) -> None:
    """Run the API alone until a signal; raise one of `START_ERRORS` if it cannot start."""
    server = DrainingServer(create_app(settings), settings.grace_s)
    listener = listen(settings.host, settings.port)
    _warn_if_open(settings, listener)
    print(f"Glimmer's API listens on {url_of(listener)}", flush=True)
    asyncio.run(server.serve(sockets=[listener]))


def run_all(settings: ServerSettings, engines: EngineProcesses) -> int:
    """Run API, engines and, without `redis_url`, Redis until a signal; return the exit code. Raises as `run_api`."""
    with listen(settings.host, settings.port) as listener:
        _warn_if_open(settings, listener)
        if settings.redis_url is not None:
            return asyncio.run(_serve(settings, engines, settings.redis_url, listener))
        with EmbeddedRedis(engines.data_dir) as redis:
            event(logger, "redis_started", data_dir=engines.data_dir, pid=redis.pid)
            return asyncio.run(_serve_with(redis, settings, engines, listener))


def _warn_if_open(settings: ServerSettings, listener: socket.socket) -> None:
    if not settings.asks_for_keys and not is_loopback(listener.getsockname()[0]):
        hint = (
            "anyone who reaches this address may generate images; set --api-keys or --api-key, or listen on 127.0.0.1"
        )
        event(logger, "open_to_all", logging.WARNING, url=url_of(listener), hint=hint)


async def _serve_with(
    redis: EmbeddedRedis, settings: ServerSettings, engines: EngineProcesses, listener: socket.socket
) -> int:
    restarter = asyncio.create_task(_keep_alive(redis))
    try:
        return await _serve(settings, engines, redis.url, listener)
    finally:
        restarter.cancel()


async def _keep_alive(redis: EmbeddedRedis) -> None:
    """Restart Redis whenever it dies, without waiting until it has loaded: its data is on disk, clients reconnect."""
    loading = False
    while True:
        await asyncio.sleep(REDIS_POLL_INTERVAL_S)
        if not redis.alive:
            event(logger, "redis_died", logging.ERROR)
            try:
                redis.restart()  # not in a thread: Redis ends with the thread that starts it
                loading = True
            except OSError as error:
                event(logger, "redis_not_started", logging.ERROR, reason=error)
        elif loading and await asyncio.to_thread(redis.answers):
            loading = False
            event(logger, "redis_started", pid=redis.pid)


async def _serve(settings: ServerSettings, engines: EngineProcesses, redis_url: str, listener: socket.socket) -> int:
    base = {**os.environ, **engines.environment, "GLIMMER_REDIS_URL": redis_url}
    for name in ("GLIMMER_API_KEY", "GLIMMER_PROMPT_REWRITER_KEY"):
        base.pop(name, None)  # engines do not need the secrets
    environments = engine_environments(base, engines.count, engines.device)
    async with open_queue(redis_url) as queue:
        supervisor = Supervisor(engines.command, environments, JobConsumer(queue.client))
        server = DrainingServer(create_app(settings, queue), settings.grace_s)
        api = asyncio.create_task(server.serve(sockets=[listener]))
        supervision = asyncio.create_task(supervisor.run())
        announcement = asyncio.create_task(_announce(queue, url_of(listener)))
        drained = asyncio.create_task(server.drained.wait())
        try:
            await asyncio.wait({api, supervision, drained}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            announcement.cancel()
            drained.cancel()
            server.should_exit = True
            # One grace period in all, plus seconds for last bytes: engines work on while requests finish, then on other
            # servers' jobs.
            await asyncio.wait({api, supervision, asyncio.create_task(supervisor.stop(server.grace_left_s))})
        return _exit_code(api, supervision)


def _exit_code(api: "asyncio.Task[None]", supervision: "asyncio.Task[None]") -> int:
    api.result()
    error = supervision.exception()
    if isinstance(error, EngineMisconfigured):
        event(logger, "stopped", logging.ERROR, reason=error)
        return EXIT_CONFIGURATION
    if error is not None:
        raise error
    return 0


async def _announce(queue: JobProducer, url: str) -> None:
    while True:
        with contextlib.suppress(QueueUnavailable):
            if ready := ready_engines(await queue.engines()):
                print(f"Glimmer is ready at {url} (model {ready[0].model}; API reference at {url}/docs)", flush=True)
                return
        await asyncio.sleep(0.2)
