"""What an engine process loads and reports."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineSettings
from engine.jobs.job import EngineInfo
from engine.worker import process
from models.glm_image.config import RequestDefaults
from models.glm_image.model import GlmImage

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
