"""What depends on the schedule and the size alone is computed once for all images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.jobs.job import JobSpec, Plan
from engine.renderer.modulations import CHUNK, ModulationCache
from engine.renderer.rendering import Rendering
from engine.request import Image, Request
from models.glm_image.model import GlmImage
from models.glm_image.renderer import stack_modulations
from tests.checkpoints import small_engine

SIZES = [(64, 64), (96, 64), (64, 96), (128, 64)]


def rendering(model: GlmImage, size: tuple[int, int], steps: int) -> Rendering:
    spec = JobSpec("a", *size, seed=1, num_inference_steps=steps)
    plan = spec.geometry.plan
    tokens = Plan(plan.rows, plan.cols, [1] * plan.tokens)
    return small_engine(model).renderer.runner.prepare(Image(Request("r", spec), 0, plan=tokens))


def test_images_of_equal_size_and_steps_compute_modulations_once_in_16_steps(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = type(model.renderer).modulations
    monkeypatch.setattr(
        type(model.renderer), "modulations", lambda self, temb: computed.append(len(temb)) or real(self, temb)
    )
    specs = [JobSpec("a", *size, seed=seed, num_inference_steps=20) for size in SIZES[:2] for seed in range(3)]
    small_engine(model).generate(specs)
    assert computed == [CHUNK] * 4


@torch.inference_mode()
def test_the_cache_is_bounded_and_changes_no_bit(model: GlmImage) -> None:
    images = [rendering(model, size, steps) for size in SIZES for steps in (3, 40)]
    chunk = ModulationCache(model.renderer).of_step(images[:1]).nbytes * CHUNK
    ample = ModulationCache(model.renderer)

    @given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 39)), min_size=1, max_size=12))
    def holds(chunks: int, picks: list[tuple[int, int]]) -> None:
        small = ModulationCache(model.renderer, chunks * chunk)
        for index, step in picks:
            images[index].step = step % images[index].steps
        batch = [images[index] for index, _ in picks]
        together = small.of_step(batch)
        assert small.bytes <= chunks * chunk
        assert torch.equal(together, ample.of_step(batch))
        assert torch.equal(together, stack_modulations([ample.of_step([image]) for image in batch]))

    holds()
