"""Memory that an engine needs, before it loads."""

from pathlib import Path

import pytest
import torch

from engine import memory_estimate
from engine.config import EngineSettings
from engine.errors import StartError
from engine.memory_estimate import check_memory, estimate_memory
from models.glm_image.model import GlmImage, Stage
from models.nano import CHECKPOINT

CPU = torch.device("cpu")


def settings(**changed: object) -> EngineSettings:
    return EngineSettings(redis_url="", **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["all", "plan", "render"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_estimated_as_they_are_loaded(stage: Stage, dtype: torch.dtype) -> None:
    loaded = GlmImage.load(str(CHECKPOINT), CPU, dtype, stage).weight_bytes
    estimate = estimate_memory(CHECKPOINT, stage, dtype, kv_tokens=0, on_cuda=False)
    assert sum(estimate.weights.values()) == pytest.approx(loaded, rel=0.02)


def test_an_engine_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = estimate_memory(CHECKPOINT, "all", torch.float32, kv_tokens=0, on_cuda=False).total
    plan = estimate_memory(CHECKPOINT, "plan", torch.float32, kv_tokens=0, on_cuda=False).total
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: plan)
    with pytest.raises(StartError, match="what would fit") as raised:
        check_memory(settings(), str(CHECKPOINT), CPU, torch.float32)
    assert "GLIMMER_STAGE=plan" in str(raised.value)
    assert "GLIMMER_STAGE=render" not in str(raised.value)
    check_memory(settings(stage="plan"), str(CHECKPOINT), CPU, torch.float32)
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: whole)
    check_memory(settings(), str(CHECKPOINT), CPU, torch.float32)
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: whole - 1)
    with pytest.raises(StartError, match="GLIMMER_DTYPE=bfloat16"):
        check_memory(settings(), str(CHECKPOINT), CPU, torch.float32)


def test_a_device_that_is_far_too_small_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: 1000)
    with pytest.raises(StartError, match="needs a larger device"):
        check_memory(settings(), str(CHECKPOINT), CPU, torch.float32)


def test_a_cache_set_by_hand_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = estimate_memory(CHECKPOINT, "all", torch.float32, kv_tokens=0, on_cuda=False).total
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: whole)
    with pytest.raises(StartError, match="GLIMMER_KV_TOKENS unset"):
        check_memory(settings(kv_tokens=10_000), str(CHECKPOINT), CPU, torch.float32)


def test_a_checkpoint_without_weights_is_refused_as_before(tmp_path: Path) -> None:
    from models.errors import CheckpointError

    with pytest.raises(CheckpointError):
        estimate_memory(tmp_path, "all", torch.float32, kv_tokens=0, on_cuda=False)
