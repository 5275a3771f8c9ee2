"""No step of the engine is long, whatever a request asks for, and a step gives signs of life."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine import preparation
from engine.engine import Engine
from engine.errors import RequestError
from engine.jobs.job import JobSpec
from engine.preparation import GLYPH_TOKENS
from engine.renderer import glyphs, stage
from engine.request import Event, Failed, Finished, Rendered, Request
from models.glm_image.glyphs import BATCH_TOKENS
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.source_images import source_image, source_images

NEIGHBOUR = JobSpec("a 'neighbour'", 64, 64, seed=1, num_inference_steps=2)
EDIT = JobSpec("make it 'RED'", 64, 96, seed=3, num_inference_steps=2, num_sources=4)


def edit(engine: Engine, name: str, spec: JobSpec, side: int = 96) -> Request:
    given = source_images(*[source_image(number, side, side) for number in range(spec.num_sources)])
    return Request(name, spec, source_images=given, preprocessed=engine.preprocess_images(given))


def steps(engine: Engine) -> Iterator[list[Event]]:
    while not engine.is_idle:
        yield engine.step()
    engine.check_integrity()


def record(monkeypatch: pytest.MonkeyPatch, target: object, name: str) -> list[Any]:
    """Record the first arguments of a method's calls."""
    real, calls = getattr(target, name), list[Any]()
    monkeypatch.setattr(target, name, lambda first, *rest: (calls.append(first), real(first, *rest))[1])
    return calls


def test_a_step_encodes_one_source_image_at_most_and_neighbours_go_on(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SOURCE_SECONDS", 3600)  # as on a fast device
    engine = small_engine(model)
    encoded, read = (record(monkeypatch, *call) for call in ((model, "encode_source"), (model.renderer, "read_source")))
    for request in [*(edit(engine, f"edit {number}", EDIT) for number in range(3)), Request("neighbour", NEIGHBOUR)]:
        engine.submit(request)
    counts, finished = [0], list[str]()
    for events in steps(engine):
        counts.append(len(encoded) + len(read))
        finished += [event.request.id for event in events if isinstance(event, Finished)]
    assert max(after - before for before, after in pairwise(counts)) == 1
    assert counts[-1] == 2 * 3 * 4
    assert sorted(finished) == ["edit 0", "edit 1", "edit 2", "neighbour"]


def test_while_others_work_source_images_take_half_of_the_time(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let each piece take 10 seconds of a clock that all other steps advance by 1."""
    engine, now = small_engine(model), 0.0
    monkeypatch.setattr(preparation.time, "monotonic", lambda: now)
    real = model.encode_source
    pieces, number = list[int](), 0

    def slow(image: Any) -> Any:
        nonlocal now
        now += 10
        pieces.append(number)
        return real(image)

    monkeypatch.setattr(model, "encode_source", slow)
    engine.submit(Request("neighbour", replace(NEIGHBOUR, num_inference_steps=100)))
    engine.submit(edit(engine, "edit", EDIT))
    for number, _ in enumerate(steps(engine), 1):  # noqa: B007
        now += 1
    assert [after - before for before, after in pairwise(pieces)] == [10, 10, 10]


def test_a_small_edit_does_not_wait_for_large_ones(model: GlmImage) -> None:
    engine = small_engine(model)
    for number in range(3):
        engine.submit(edit(engine, f"large {number}", EDIT, side=256))
    engine.submit(edit(engine, "small", replace(EDIT, num_sources=1)))
    finished = [e.request.id for events in steps(engine) for e in events if isinstance(e, Finished)]
    assert finished[0] == "small"


def test_a_step_encodes_a_bounded_number_of_glyphs(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(model, max_prompt_tokens=9000)
    padded: list[int] = []
    width = model.glyphs.encoder.config.d_model

    def forward(tokens: Tensor, **_: Tensor) -> Any:
        padded.append(tokens.numel())
        return SimpleNamespace(last_hidden_state=torch.zeros(*tokens.shape, width))

    monkeypatch.setattr(model.glyphs.encoder, "forward", forward)
    many = "'" + "''".join(f"{letter * 2000}" for letter in "abcd") + "'"
    odd = "'" + "x" * 2047 + "'" + "'a'" * 40
    spec = replace(NEIGHBOUR, prompt=many, negative_prompt=odd, plan={"rows": 2, "cols": 2, "tokens": [0] * 4})
    for number in range(3):
        engine.submit(
            Request(str(number), replace(spec, prompt=many + str(number), negative_prompt=f"{odd}'{number}'"))
        )
    engine.submit(Request("neighbour", NEIGHBOUR))
    per_step = [0]
    while not per_step[1:] or engine._preparation:
        assert not any(isinstance(event, Failed) for event in engine.step())
        per_step.append(sum(padded) - sum(per_step))
    assert max(per_step) <= GLYPH_TOKENS + BATCH_TOKENS
    assert sum(count > 0 for count in per_step) > 3


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"negative_prompt": "'" + "x" * 2047 + "'" + "'ab'" * 3000}, "negative_prompt", "invalid_value"),
        ({"negative_prompt": f"'{'x' * 1900}'" * 5}, "negative_prompt", "invalid_value"),
        ({"negative_prompt": "x " * 3000}, "negative_prompt", "prompt_too_long"),
        ({"prompt": "''" * 1100}, "prompt", "invalid_value"),
    ],
)
def test_long_texts_are_refused_before_any_model_work(
    model: GlmImage, change: dict[str, str], param: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)
    worked = [
        record(monkeypatch, *call)
        for call in ((model.glyphs, "encode_by_batch"), (model, "encode_source"), (engine.planner.runner, "prefill"))
    ]
    engine.submit(edit(engine, "bad", replace(EDIT, **change)))
    [failed] = [event for events in steps(engine) for event in events if isinstance(event, Failed)]
    assert isinstance(failed.error, RequestError)
    assert (failed.error.param, failed.error.code) == (param, code)
    assert not any(worked)


def test_cached_glyphs_are_bounded_by_their_tokens(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "MAX_CACHED_TOKENS", 16384 // 2)
    cache = small_engine(model).renderer.runner.glyphs
    for number in range(4):
        request = Request(str(number), replace(NEIGHBOUR, prompt=f"'{number}{'x' * 2000}'" * 3))
        first, second = cache.of(request)[0], cache.of(request)[0]
        assert first is second
        assert sum(map(len, cache._by_strings.values())) <= 16384 // 2
        cache.release(request)
    assert not cache._by_request


def test_finished_images_are_decoded_over_several_steps(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "DECODED_PIXELS", 2 * 64 * 64)
    engine = small_engine(model, render_token_budget=20_000)
    planned = replace(NEIGHBOUR, n=5, plan={"rows": 2, "cols": 2, "tokens": [0] * 4})  # else they end one after another
    engine.submit(Request("many", planned))
    decoded = [sum(isinstance(event, Rendered) for event in events) for events in steps(engine)]
    assert [count for count in decoded if count] == [2, 2, 1]
    engine.submit(Request("gone", planned))
    while not any(isinstance(event, Rendered) for event in engine.step()):
        pass
    engine.cancel("gone")
    assert not any(isinstance(event, Rendered) for events in steps(engine) for event in events)


def test_little_is_computed_between_two_signs_of_life(model: GlmImage) -> None:
    """Compare with all that is computed: a layer or a batch is a small part of it."""
    spec = replace(EDIT, prompt="a 'b'" * 50, n=3, width=256, height=256)
    engine = small_engine(model)
    counter = FlopCounterMode(display=False)
    at_beat = [0]
    engine.on_progress(lambda: at_beat.append(counter.get_total_flops()))
    engine.submit(edit(engine, "a", spec, side=256))
    with counter:
        for _ in steps(engine):
            pass
    engine.on_progress(lambda: None)
    between = [after - before for before, after in pairwise(at_beat)]
    assert max(between) < 0.15 * at_beat[-1]


def test_beats_are_given_to_the_last_listener_only(model: GlmImage) -> None:
    engine, counts = small_engine(model), [0, 0]

    def count(index: int) -> Callable[[], None]:
        def beat() -> None:
            counts[index] += 1

        return beat

    engine.on_progress(count(0))
    engine.on_progress(count(1))
    engine.generate([NEIGHBOUR])
    engine.on_progress(lambda: None)
    assert counts[0] == 0
    assert counts[1] > 100
    assert not torch.is_inference_mode_enabled()
