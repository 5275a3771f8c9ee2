"""Partial images: the preview as soon as it is written, then the image as its last step predicts it."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.geometry import CELL
from engine.jobs.job import JobSpec, Plan
from engine.renderer.rendering import Rendering
from engine.renderer.timesteps import partial_steps
from engine.request import Failed, Finished, Image, Partial, Planned, Rendered, Request
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_engine import pixels_of, run

pytestmark = pytest.mark.usefixtures("two_threads")

SPEC = JobSpec('a poster "HELLO"', 96, 64, seed=3, num_inference_steps=6)


def partials_of(events: list, index: int = 0) -> list[Partial]:
    return [event for event in events if isinstance(event, Partial) and event.image.index == index]


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(20, 3, [5, 10, 15]), (12, 2, [4, 8]), (6, 1, [3]), (2, 3, [1]), (1, 3, []), (9, 0, [])],
)
def test_partial_images_are_spread_over_the_steps(steps: int, count: int, expected: list[int]) -> None:
    assert partial_steps(steps, count) == expected


def test_the_preview_comes_before_the_plan_is_written(model: GlmImage) -> None:
    engine = small_engine(model)
    events = run(engine, [Request("r", replace(SPEC, partial_images=3, n=2, width=192, height=320))])
    for index in (0, 1):
        partials = partials_of(events, index)
        assert [partial.index for partial in partials] == [0, 1, 2]
        planned = next(e for e in events if isinstance(e, Planned) and e.index == index)
        assert events.index(partials[0]) < events.index(planned)
        assert partials[0].grid == planned.plan.preview
        assert partials[1].grid.tokens == planned.plan.tokens
        preview = partials[0].grid
        assert partials[0].pixels.shape == (preview.rows * CELL, preview.cols * CELL, 3)
        assert partials[1].pixels.shape == partials[2].pixels.shape == (320, 192, 3)
    assert isinstance(events[-1], Finished)


def test_partial_images_change_no_image(model: GlmImage) -> None:
    specs = [SPEC, replace(SPEC, seed=4, guidance_scale=1.0), replace(SPEC, seed=5, width=160)]
    plain = pixels_of(run(small_engine(model), [Request(str(i), spec) for i, spec in enumerate(specs)]))
    with_partials = [replace(spec, partial_images=count) for count, spec in enumerate(specs, start=1)]
    events = run(small_engine(model), [Request(str(i), spec) for i, spec in enumerate(with_partials)])
    for name, pixels in pixels_of(events).items():
        assert torch.equal(pixels, plain[name])


def test_partial_images_are_the_same_alone_and_in_a_batch(model: GlmImage) -> None:
    spec = replace(SPEC, partial_images=3)
    alone = partials_of(run(small_engine(model), [Request("a", spec)]))
    others = [Request(str(seed), replace(SPEC, seed=seed, num_inference_steps=4)) for seed in range(5)]
    among = run(small_engine(model), [*others[:3], Request("a", spec), *others[3:]])
    for one, other in zip(alone, [p for p in partials_of(among) if p.image.request.id == "a"], strict=True):
        assert torch.equal(one.pixels, other.pixels)


THREE = [replace(SPEC, partial_images=count, seed=10 * count, num_inference_steps=12) for count in (3, 2, 1)]


@pytest.fixture(scope="module")
def in_order(model: GlmImage) -> list[list[Partial]]:
    """Return the partial images of `THREE`, each alone."""
    return [partials_of(run(small_engine(model), [Request("r", spec)])) for spec in THREE]


@pytest.mark.parametrize("late", [0.0, 0.5, 0.8, 0.9])
def test_partial_images_do_not_depend_on_the_order_of_work(
    model: GlmImage, in_order: list[list[Partial]], monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    """Tick any images first, also before a preview, which the first partial image waits for."""
    engine, rng = small_engine(model), random.Random(late)
    scheduler = engine.renderer.scheduler

    def pick() -> list[Rendering]:
        wanted = [r for r in scheduler if rng.random() < 0.7 and not (r.is_preview and rng.random() < late)]
        return wanted or list(scheduler)[:1]

    monkeypatch.setattr(scheduler, "pick", pick)
    events = run(engine, [Request(str(i), spec) for i, spec in enumerate(THREE)])
    for index, expected in enumerate(in_order):
        found = [p for p in partials_of(events) if p.image.request.id == str(index)]
        assert found == sorted(found, key=lambda partial: partial.index)
        assert late or len(found) == len(expected)
        for partial in found:
            assert torch.equal(partial.pixels, expected[partial.index].pixels)


def test_a_partial_image_is_decoded_without_the_noise_of_the_last_step(model: GlmImage) -> None:
    """Compare with a single step from there to the end."""
    runner = small_engine(model).renderer.runner
    image = Image(Request("r", replace(SPEC, partial_images=1)), 0, plan=Plan(2, 3, [1, 2, 3, 4, 5, 6]))
    rendering = runner.prepare(image)
    for _ in range(2):
        runner.advance([rendering])
    before = rendering.latents
    runner.advance([rendering])
    assert rendering.has_partial_due
    velocity = rendering.velocity
    assert velocity is not None
    partial = runner.decode(rendering)()
    rendering.latents, rendering.step = before - rendering.sigmas[2] * velocity, rendering.steps
    assert (partial.int() - runner.decode(rendering)().int()).abs().max() <= 1


def test_a_given_plan_sends_its_preview_if_it_has_one(model: GlmImage) -> None:
    [planned] = [e for e in run(small_engine(model), [Request("r", SPEC)]) if isinstance(e, Planned)]
    given = replace(SPEC, partial_images=2, plan=planned.plan.to_dict())
    engine = small_engine(model)
    partials = partials_of(run(engine, [Request("r", given)]))
    assert [partial.index for partial in partials] == [0, 1]
    assert partials[0].grid == planned.plan.preview
    bare = replace(planned.plan, preview=None).to_dict()
    partials = partials_of(run(engine, [Request("r", replace(given, plan=bare))]))
    assert [(p.index, p.grid.tokens) for p in partials] == [(0, planned.plan.tokens), (1, planned.plan.tokens)]


def test_a_preview_that_cannot_be_decoded_fails_its_request_alone(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)
    decode = engine.renderer.runner.decode

    def broken(rendering: Rendering) -> Callable[[], torch.Tensor]:
        if rendering.is_preview:
            raise ValueError("planted")
        return decode(rendering)

    monkeypatch.setattr(engine.renderer.runner, "decode", broken)
    events = run(engine, [Request("bad", replace(SPEC, partial_images=1)), Request("good", SPEC)])
    assert [e.request.id for e in events if isinstance(e, Failed)] == ["bad"]
    assert [e.image.request.id for e in events if isinstance(e, Rendered)] == ["good"]


def test_a_cancelled_request_leaves_no_preview_behind(model: GlmImage) -> None:
    engine = small_engine(model)
    engine.submit(Request("r", replace(SPEC, partial_images=1)))
    while not len(engine.renderer.scheduler):
        engine.step()
    engine.cancel("r")
    assert not any(isinstance(event, Partial) for event in engine.step())
    assert engine.is_idle
    engine.check_integrity()
