"""What the routes share, made once by the app's lifespan."""

import time
from dataclasses import dataclass, field

from fastapi import Request

from engine.jobs.queue import JobQueue
from server.admission import Admission, EngineDirectory, Gate
from server.metrics import Metrics
from server.settings import ServerSettings
from server.withdrawals import Withdrawals


@dataclass(frozen=True)
class Services:
    """The parts behind the routes. `started_at` is seconds since the epoch."""

    settings: ServerSettings
    queue: JobQueue
    engines: EngineDirectory
    admission: Admission
    withdrawals: Withdrawals
    gate: Gate
    metrics: Metrics
    started_at: int = field(default_factory=lambda: int(time.time()))


def services(request: Request) -> Services:
    """A dependency: the services of the app that serves `request`."""
    return request.app.state.services
