"""What the routes share, made once by the app's lifespan."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from engine.jobs.producer import JobProducer
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admission
from server.admission.engine_directory import EngineDirectory
from server.admission.gate import Gate
from server.admission.keys import KeyRing
from server.metrics import Metrics
from server.requests.prompt_rewriter import Rewriter
from server.responses.outcomes import JobOutcomes
from server.settings import ServerSettings


@dataclass(frozen=True)
class Services:
    """The parts behind the routes.

    Args:
        rewriter: None where none is set.
        decoders: places for those who decode uploads, which takes memory.
        started_at: seconds since the epoch.
    """

    settings: ServerSettings
    queue: JobProducer
    engines: EngineDirectory
    keys: KeyRing
    admission: Admission
    rewriter: Rewriter | None
    abandoned_jobs: AbandonedJobs
    outcomes: JobOutcomes
    gate: Gate
    metrics: Metrics
    decoders: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    started_at: int = field(default_factory=lambda: int(time.time()))


async def get_services(request: Request) -> Services:
    """Return the services of the app that serves `request`."""
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(get_services)]
"""The type of a route's parameter that takes the services."""
