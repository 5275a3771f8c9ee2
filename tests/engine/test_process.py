"""What an engine process loads and reports."""

import shutil
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineSettings
from engine.jobs.job import EngineInfo
from engine.observability.tracing import open_tracing
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
        fingerprint=model.fingerprint(),
    )
    info = process._ready(STARTING, replace(model, defaults=RequestDefaults(12, 0.0, "128x96")), "some/model")
    assert info == replace(plain, default_size="128x96", default_steps=12, default_guidance=0.0)


def test_reading_all_weights_does_not_hold_up_heartbeats(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the threads that compute the fingerprints."""
    threads: list[threading.Thread] = []

    def record(_: object) -> str:
        threads.append(threading.current_thread())
        return "f"

    class Stop(Exception):
        pass

    async def run(worker: Worker) -> None:
        raise Stop

    for name in ("fingerprint", "planning_fingerprint"):
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
