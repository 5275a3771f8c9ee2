"""Starting API, engines and Redis, and stopping them in order."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EXIT_CONFIGURATION
from engine.errors import QueueUnavailable, StartError
from engine.jobs.consumer import JobConsumer
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.producer import JobProducer
from engine.jobs.redis_check import check_redis
from engine.observability.logs import event
from engine.stop_signals import Stopped, StopSignals, run
from server.addresses import is_loopback
from server.admission.engine_directory import ready_engines
from server.app import create_app
from server.processes.redis_keeper import keep_alive
from server.processes.serving import DrainingServer, describe, listen, url_of
from server.processes.supervisor import EngineMisconfigured, Supervisor, engine_environments
from server.services import open_queue
from server.settings import ServerSettings

ENGINE_COMMAND = (sys.executable, "-m", "server.cli", "engine")

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


def run_api(settings: ServerSettings, stop: StopSignals) -> None:
    """Run the API alone until a signal; raise `StartError` if it cannot start."""
    with suppress(Stopped):
        run(_run_api(settings, stop))


def run_all(settings: ServerSettings, engines: EngineProcesses, stop: StopSignals) -> int:
    """Run API, engines and, without `redis_url`, Redis until a signal; return the exit code.

    Raises:
        StartError, QueueUnavailable: it cannot start.
    """
    try:
        return run(_run_all(settings, engines, stop))
    except Stopped:
        return 0


async def _run_api(settings: ServerSettings, stop: StopSignals) -> None:
    stop.attach()
    server = _make_server(settings)
    with await stop.unless_stopped(asyncio.to_thread(listen, settings.host, settings.port)) as listener:
        _warn_if_open(settings, listener)
        await stop.unless_stopped(check_redis(str(settings.redis_url)))
        server.on_start = lambda: _print(f"Glimmer's API listens on {url_of(listener)}")
        signals = asyncio.create_task(server.follow(stop))
        try:
            await server.serve(sockets=[listener])
        finally:
            signals.cancel()


async def _run_all(settings: ServerSettings, engines: EngineProcesses, stop: StopSignals) -> int:
    stop.attach()
    with await stop.unless_stopped(asyncio.to_thread(listen, settings.host, settings.port)) as listener:
        _warn_if_open(settings, listener)
        if settings.redis_url is not None:
            await stop.unless_stopped(check_redis(settings.redis_url))
            return await _serve(settings, engines, settings.redis_url, listener, stop)
        with EmbeddedRedis(engines.data_dir, wait=False) as redis:
            while not await stop.unless_stopped(asyncio.to_thread(redis.wait_until_ready)):
                redis.restart()  # not in a thread: Redis ends with the thread that starts it
            event(logger, "redis_started", data_dir=engines.data_dir, pid=redis.pid)
            restarter = asyncio.create_task(keep_alive(redis))
            try:
                return await _serve(settings, engines, redis.url, listener, stop)
            finally:
                restarter.cancel()


def _make_server(settings: ServerSettings, queue: JobProducer | None = None) -> DrainingServer:
    try:
        app = create_app(settings, queue)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"the API cannot start: {describe(error)}") from error
    return DrainingServer(app, settings.grace_s, settings.drain_delay_s)


def _warn_if_open(settings: ServerSettings, listener: socket.socket) -> None:
    if not settings.asks_for_keys and not is_loopback(listener.getsockname()[0]):
        hint = (
            "anyone who reaches this address may generate images; set --api-keys or --api-key, or listen on 127.0.0.1"
        )
        event(logger, "open_to_all", logging.WARNING, url=url_of(listener), hint=hint)


async def _serve(
    settings: ServerSettings, engines: EngineProcesses, redis_url: str, listener: socket.socket, stop: StopSignals
) -> int:
    base = {**os.environ, **engines.environment, "GLIMMER_REDIS_URL": redis_url}
    for name in ("GLIMMER_API_KEY", "GLIMMER_PROMPT_REWRITER_KEY"):
        base.pop(name, None)  # engines do not need the secrets
    environments = engine_environments(base, engines.count, engines.device)
    async with open_queue(redis_url, settings) as queue:
        supervisor = Supervisor(engines.command, environments, JobConsumer(queue.client))
        server = _make_server(settings, queue)
        signals = asyncio.create_task(server.follow(stop))
        api = asyncio.create_task(server.serve(sockets=[listener]))
        supervision = asyncio.create_task(supervisor.run())
        announcement = asyncio.create_task(_announce(queue, url_of(listener)))
        drained = asyncio.create_task(server.drained.wait())
        try:
            await asyncio.wait({api, supervision, drained}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (announcement, drained):
                task.cancel()
            server.should_exit = True
            # One grace period in all, plus seconds for last bytes: engines work on while requests finish, then on other
            # servers' jobs.
            stopping = asyncio.create_task(supervisor.stop(server.grace_left_s, stop.hurried))
            await asyncio.wait({api, supervision, stopping})
            signals.cancel()
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
        with suppress(QueueUnavailable):
            if ready := ready_engines(await queue.engines()):
                _print(f"Glimmer is ready at {url} (model {ready[0].model}; API reference at {url}/docs)")
                return
        await asyncio.sleep(0.2)


def _print(line: str) -> None:
    with suppress(OSError):  # whatever stdout is, the server serves
        print(line, flush=True)
