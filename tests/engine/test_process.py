"""What an engine process loads and reports."""

import asyncio
import shutil
import threading
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from engine.config import EngineSettings
from engine.errors import StartError
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import EngineInfo
from engine.observability.tracing import Tracing, open_tracing
from engine.stop_signals import StopSignals
from engine.stop_signals import run as run_loop
from engine.worker import process
from engine.worker.worker import Worker
from models.glm_image.config import RequestDefaults
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine

STARTING = EngineInfo("engine-0", 1, "all", "starting", "", "", 0, 2048)


def test_the_heartbeat_has_the_checkpoint_s_defaults(model: GlmImage) -> None:
    plain = process._ready(STARTING, model, "some/model")
    assert plain == replace(
        STARTING,
        state="ready",
        model="some/model",
        default_size="256x256",
        codebook_size=512,
        default_steps=50,
        default_guidance=1.5,
        **dict(zip(("fingerprint", "planner", "renderer"), model.fingerprints(), strict=True)),
    )
    info = process._ready(STARTING, replace(model, defaults=RequestDefaults(12, 0.0, "128x96", 10)), "some/model")
    expected = replace(plain, default_size="128x96", default_steps=12, default_guidance=0.0, max_text_characters=10)
    assert info == expected


def test_reading_all_weights_does_not_hold_up_heartbeats(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the threads that compute the fingerprints."""
    threads: list[threading.Thread] = []

    def record(_: object) -> str:
        threads.append(threading.current_thread())
        return "fgh"

    class Stop(Exception):
        pass

    async def run(worker: Worker) -> None:
        raise Stop

    for name in ("fingerprints", "planning_fingerprint"):
        monkeypatch.setattr(GlmImage, name, record)
    monkeypatch.setattr(process, "_load", lambda settings: small_engine(model))
    monkeypatch.setattr(Worker, "run", run)
    settings = EngineSettings(redis_url="unix:///nowhere", engine_id="e")
    with pytest.raises(Stop), StopSignals() as stop, closing(open_tracing("test")) as tracing:
        run_loop(process._serve(settings, tracing, stop))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("configured", [None, ""])
def test_without_a_model_the_shipped_checkpoint_is_served(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str | None
) -> None:
    """Load a small stand-in for it. Compose files pass an empty variable for "none"."""
    shipped = shutil.copytree(checkpoint, tmp_path / "shipped")
    (shipped / "glimmer.json").write_text('{"num_inference_steps": 9}')
    monkeypatch.setattr(process, "CHECKPOINT", shipped)
    engine = process._load(EngineSettings(redis_url="", engine_id="e", model=configured, device="cpu", max_images=1))
    info = process._ready(STARTING, engine.model, configured)
    assert (info.model, info.default_steps) == ("glimmer-nano", 9)


async def test_an_engine_is_announced_as_starting_only_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = threading.Event()

    class Deaf(JobConsumer):
        async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
            """Swallow a cancellation, as redis-py does while it connects."""
            if not announced.is_set():
                announced.set()
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)

    def load(_: EngineSettings) -> NoReturn:
        announced.wait(10)
        raise StartError("no checkpoint")

    monkeypatch.setattr(process, "JobConsumer", Deaf)
    monkeypatch.setattr(process, "_load", load)
    with pytest.raises(StartError):
        await process._serve(EngineSettings(redis_url="redis://127.0.0.1:1"), Tracing(), StopSignals())
    assert not [task for task in asyncio.all_tasks() if "object _announce at" in str(task.get_coro())]
