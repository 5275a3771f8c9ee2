"""The benchmark's own code: that it runs, and that its arithmetic is that of the published sizes."""

from pathlib import Path

import pytest
import torch

from benchmarks.full_size import planner_bytes, renderer_flop, run_full_size
from benchmarks.measure import Measurement, merge
from benchmarks.throughput import requests, run_small
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.planner import Planner


def test_the_small_run_prints_every_contestant(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(str(checkpoint), count=1, rounds=1, device=torch.device("cpu"))
    printed = capsys.readouterr().out
    for label in ("diffusers, one by one", "batched", "concurrency 1", "concurrency 4", "concurrency 16"):
        assert label in printed


def test_requests_mix_all_sizes_and_steps() -> None:
    specs = requests(9)
    assert len({(spec.width, spec.height, spec.num_inference_steps) for spec in specs}) == 9


def test_rounds_add_up() -> None:
    both = merge([Measurement("a", 2.0, [1.0, 2.0], 3.0), Measurement("a", 4.0, [3.0], 5.0)])
    assert (both.seconds, both.images_per_second, both.p50, both.planner_ms_per_token) == (6.0, 0.5, 2.0, 4.0)


def test_floors_are_those_of_the_published_sizes() -> None:
    with torch.device("meta"):
        planner = Planner(PlannerConfig())
    assert planner_bytes(planner) == pytest.approx(16.45e9, rel=1e-3)
    assert renderer_flop(RendererConfig()) == pytest.approx(5.77e15, rel=0.02)


def test_the_full_size_asks_for_a_gpu() -> None:
    with pytest.raises(SystemExit, match="CUDA"):
        run_full_size(torch.device("cpu"))
