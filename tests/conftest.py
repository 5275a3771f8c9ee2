"""Shared fixtures: one real Redis server per session, emptied after each test, and a small random checkpoint."""

import logging
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio
from hypothesis import settings

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.result_store import ResultStore
from models.glm_image.model import GlmImage
from tests.checkpoints import load, write_variant
from tests.job_queue import JobQueue
from tests.object_storage import MORTAL_BUCKET, ObjectStorage

settings.register_profile("busy", deadline=None)  # an example may take any time on a busy machine
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """Restore logging and signals, which commands that run in this process set."""
    root, ours = logging.getLogger(), logging.getLogger("glimmer")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    signals = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for sig, handler in signals.items():
        if signal.getsignal(sig) is not handler:
            signal.signal(sig, handler)
            signal.set_wakeup_fd(-1)
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), fsync="no") as server:
        yield server


@pytest.fixture
async def redis_client(redis_server: EmbeddedRedis) -> AsyncIterator[redis.asyncio.Redis]:
    client = connect(redis_server.url)
    yield client
    await client.flushdb()
    await client.aclose()


@pytest.fixture
async def queue(redis_client: redis.asyncio.Redis) -> AsyncIterator[JobQueue]:
    queue = JobQueue(redis_client)
    yield queue
    await queue.close()


@pytest.fixture(scope="session")
def object_storage() -> Iterator[ObjectStorage]:
    with ObjectStorage() as storage:
        yield storage


@pytest.fixture
def bucket(object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket, and set the variables of AWS to where it is; return its name."""
    for name, value in object_storage.environment.items():
        monkeypatch.setenv(name, value)
    name = f"images-{secrets.token_hex(8)}"
    object_storage.make_bucket(name)
    return name


@pytest.fixture
def mortal_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """Start an object storage of this test's own, which it may kill."""
    with ObjectStorage() as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        storage.make_bucket(MORTAL_BUCKET)
        yield storage


@pytest.fixture
async def storing_queue(redis_client: redis.asyncio.Redis, bucket: str) -> AsyncIterator[JobQueue]:
    """Yield a queue that keeps the images of results in object storage."""
    queue = JobQueue(redis_client, result_store=ResultStore(f"s3://{bucket}/results"))
    yield queue
    await queue.close()


@pytest.fixture
async def mortal_queue(redis_client: redis.asyncio.Redis, mortal_storage: ObjectStorage) -> AsyncIterator[JobQueue]:
    queue = JobQueue(redis_client, result_store=ResultStore(f"s3://{MORTAL_BUCKET}"))
    yield queue
    await queue.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_variant(folder, "plain")
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> GlmImage:
    return load(checkpoint)
