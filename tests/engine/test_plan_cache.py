"""A cached plan serves only requests for the same plan from the same planner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.jobs.job import JobSpec, Plan, SourceImages
from engine.worker.plan_cache import PlanCache
from models.glm_image.model import GlmImage
from tests.checkpoints import load
from tests.job_queue import JobQueue

SPEC = JobSpec("make it 'RED'", 96, 64, seed=1, n=2, num_sources=2)
SOURCES = SourceImages([b"first", b"second"], overlay=b"mask")
PLAN = Plan(2, 3, [1, 2, 3, 4, 5, 6])


def _nudge(weight: torch.Tensor) -> None:
    """Change one value by the smallest step."""
    last = weight.data.view(-1)[-1:]
    last.copy_(torch.nextafter(last, torch.full_like(last, 9.0)))


def _swap(weight: torch.Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]]


CHANGES: dict[str, Callable[[GlmImage], object]] = {
    "planner": lambda m: _nudge(m.planner.layers[-1].mlp.down_proj.weight),  # type: ignore[union-attr,arg-type]
    "order of codes": lambda m: _swap(m.planner.lm_head.weight),
    "vision tokenizer": lambda m: _nudge(m.vision.visual.blocks[0].mlp.fc1.weight),  # type: ignore[union-attr,arg-type]
    "codebook": lambda m: _nudge(m.vision.vqmodel.quantize.embedding.weight),
    "image preprocessing": lambda m: setattr(m.prompts.processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
    "chat template": lambda m: setattr(m.prompts.processor, "chat_template", "{{ messages }}"),
    "tokenizer": lambda m: m.prompts.processor.tokenizer.add_tokens(["poster"]),
    "rotary positions": lambda m: setattr(m.planner, "config", replace(m.planner.config, rope_theta=4.0)),
    "sampling": lambda m: setattr(m, "sampling", replace(m.sampling, top_k=50)),
}


def test_models_that_plan_differently_have_different_fingerprints(checkpoint: Path) -> None:
    changed = load(checkpoint)
    known = {changed.planning_fingerprint(): "nothing"}
    for name, change in CHANGES.items():
        change(changed)
        new = changed.planning_fingerprint()
        assert new not in known, f"{name} does not change the fingerprint: same as {known[new]}"
        known[new] = name


def test_models_that_plan_the_same_share_a_fingerprint(checkpoint: Path, model: GlmImage) -> None:
    again = load(checkpoint)
    _nudge(again.renderer.proj_out.weight)
    again.defaults = replace(again.defaults, num_inference_steps=7)
    assert again.planning_fingerprint() == model.planning_fingerprint()
    other_dtype = load(checkpoint, torch.bfloat16)
    assert other_dtype.planning_fingerprint() != model.planning_fingerprint()


async def test_a_plan_is_found_for_the_same_source_images_in_the_same_order(queue: JobQueue) -> None:
    cache = PlanCache(queue, "planner", ttl_s=60)
    await cache.store(SPEC, SOURCES, 1, PLAN)
    assert await cache.lookup(SPEC, SOURCES) == {1: PLAN}
    assert await cache.lookup(SPEC, replace(SOURCES, overlay=None)) == {1: PLAN}, "the plan does not depend on a mask"
    for files in ([b"second", b"first"], [b"first"], [b"first", b"other"], [b"firsts", b"econd"]):
        assert await cache.lookup(SPEC, SourceImages(files)) == {}
    assert await cache.lookup(SPEC, None) == {}


async def test_a_plan_is_found_by_its_seed_and_not_its_index(queue: JobQueue) -> None:
    cache = PlanCache(queue, "planner", ttl_s=60)
    await cache.store(SPEC, SOURCES, 1, PLAN)
    free = {
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
        "output_format": "jpeg",
        "negative_prompt": "no 'words'",
        "quotes": "strict",
    }
    assert await cache.lookup(replace(SPEC, seed=2, n=1, **free), SOURCES) == {0: PLAN}  # type: ignore[arg-type]
    for change in ({"seed": 3}, {"prompt": "make it"}, {"width": 128}, {"temperature": 1.0}, {"top_p": 0.5}):
        assert await cache.lookup(replace(SPEC, **change), SOURCES) == {}  # type: ignore[arg-type]


async def test_planners_do_not_share_plans(queue: JobQueue) -> None:
    await PlanCache(queue, "planner", ttl_s=60).store(SPEC, SOURCES, 0, PLAN)
    assert await PlanCache(queue, "another", ttl_s=60).lookup(SPEC, SOURCES) == {}


@pytest.mark.parametrize("given", [True, False])
async def test_a_request_with_its_own_plan_or_a_disabled_cache_finds_none(queue: JobQueue, given: bool) -> None:
    cache = PlanCache(queue, "planner", ttl_s=60)
    await (cache if given else PlanCache(queue, "planner", ttl_s=0)).store(SPEC, SOURCES, 0, PLAN)
    spec = replace(SPEC, plan=PLAN.to_dict()) if given else SPEC
    assert await cache.lookup(spec, SOURCES) == {}
