"""Numbers that overflow fail their request, never give a wrong image, and harm no neighbour."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.request import Failed, Rendered, Request
from engine.worker.job_errors import to_job_error
from models.errors import NonFiniteError
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.source_images import source_image, source_images

SPEC = JobSpec("a 'word'", 64, 64, seed=5, num_inference_steps=3)
VICTIM = 1


def results(engine: Engine, specs: list[JobSpec]) -> dict[str, Any]:
    """Return the pixels or the error of every request."""
    for number, spec in enumerate(specs):
        given = source_images(source_image(number, 64, 64)) if spec.num_sources else None
        preprocessed = engine.preprocess_images(given) if given else []
        engine.submit(Request(str(number), spec, source_images=given, preprocessed=preprocessed))
    found: dict[str, Any] = {}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Rendered):
                found[event.request.id] = event.pixels
            if isinstance(event, Failed):
                found[event.request.id] = event.error
    engine.check_integrity()
    return found


def spoil_latents(engine: Engine, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine.renderer.runner
    real = runner.advance

    def advance(renderings: list[Any]) -> None:
        real(renderings)
        for rendering in renderings:
            if rendering.request.id == str(VICTIM) and rendering.step == 2:
                rendering.latents = rendering.latents.clone()
                rendering.latents[3] = value

    monkeypatch.setattr(runner, "advance", advance)


def spoil_scores(engine: Engine, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil one score of one token of the victim, in the middle of its plan."""
    step, scheduler = engine.planner.runner.step, engine.planner.scheduler
    real = step.choose

    def choose(hidden: torch.Tensor, lines: torch.Tensor, steps: torch.Tensor, *rest: Any) -> Any:
        victims = [s.buffer_index for s in scheduler.sequences if s.request.id == str(VICTIM)]
        spoilt = torch.isin(lines, torch.tensor(victims)) & (steps == 2)
        return real(hidden.masked_fill(spoilt[:, None], value), lines, steps, *rest)

    monkeypatch.setattr(step, "choose", choose)


def spoil_vision(engine: Engine, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vision, seen = engine.model.vision.visual, list[int]()

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        seen.append(1)
        if len(seen) == VICTIM + 1:
            output.last_hidden_state[0, 0] = value
        return output

    handle = vision.register_forward_hook(spoil)
    monkeypatch.setattr(engine, "check_integrity", lambda: handle.remove())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("spoil", "change"),
    [
        (spoil_latents, {}),
        (spoil_latents, {"partial_images": 2}),
        (spoil_scores, {}),
        (spoil_vision, {"num_sources": 1}),
    ],
)
def test_an_overflow_fails_its_request_alone(
    model: GlmImage,
    spoil: Callable[[Engine, float, pytest.MonkeyPatch], None],
    change: dict[str, int],
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs = [replace(SPEC, seed=seed, **change) for seed in range(3)]
    expected = results(small_engine(model), specs)
    engine = small_engine(model)
    spoil(engine, value, monkeypatch)
    got = results(engine, specs)
    engine.check_integrity()
    assert isinstance(got.pop(str(VICTIM)), NonFiniteError)
    assert all(torch.equal(got[name], expected[name]) for name in ("0", "2"))


def test_the_buffers_of_a_spoilt_plan_serve_the_next_one(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(model, max_images=10)
    with monkeypatch.context() as patch:
        spoil_scores(engine, float("nan"), patch)
        assert isinstance(results(engine, [SPEC] * 10)[str(VICTIM)], NonFiniteError)
    assert all(isinstance(result, torch.Tensor) for result in results(engine, [SPEC] * 10).values())


def test_the_error_names_what_happened() -> None:
    error = to_job_error(NonFiniteError("secret"), SPEC)
    assert (error.type, error.code) == ("server_error", "numerical_error")
    assert "secret" not in error.message
