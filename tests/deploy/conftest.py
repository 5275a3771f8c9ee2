import asyncio

import pytest

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from models.glm_image.model import GlmImage
from tests.exported_metrics import Exported, parse, read_metrics
from tests.job_queue import JobQueue


@pytest.fixture(scope="session")
def metrics_text(redis_server: EmbeddedRedis, model: GlmImage) -> str:
    """Return what a running server answers at /metrics; asked once."""

    async def read() -> str:
        client = connect(redis_server.url)
        queue = JobQueue(client)
        try:
            return await read_metrics(queue, model)
        finally:
            await client.flushdb()
            await queue.close()
            await client.aclose()

    return asyncio.run(read())


@pytest.fixture(scope="session")
def exported(metrics_text: str) -> Exported:
    """Return the samples of a running server."""
    return parse(metrics_text)
