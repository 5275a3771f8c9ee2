"""The engine without a queue: images do not depend on their batch, failures stay with their request, nothing leaks."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from engine.engine import Engine
from engine.errors import DeadlinePassed, RequestError
from engine.geometry import Geometry
from engine.jobs.job import JobSpec, Plan
from engine.request import Event, Failed, Finished, Planned, Progress, Rendered, Request
from engine.worker.encoding import encode
from models.glm_image.model import GlmImage
from models.threads import threads
from tests.checkpoints import small_engine

pytestmark = pytest.mark.usefixtures("two_threads")

PROMPTS = ['a poster "HELLO"', "red 'A' and \"BB\" " * 9, "plain", 'footer "\u00e9t\u00e9" \u300c\u6771\u4eac\u300d']


def mixed_specs(count: int) -> list[JobSpec]:
    rng = random.Random(7)
    return [
        JobSpec(
            rng.choice(PROMPTS),
            width=rng.choice([64, 96, 100, 160]),
            height=rng.choice([64, 90, 128]),
            seed=rng.randrange(2**32),
            n=rng.choice([1, 1, 1, 2]),
            num_inference_steps=rng.choice([2, 3, 6]),
            guidance_scale=rng.choice([1.0, 1.5, 4.0]),
            temperature=rng.choice([None, 0.0, 1.3]),
            top_p=rng.choice([None, 1.0]),
            negative_prompt=rng.choice(["", "no 'words'"]),
        )
        for _ in range(count)
    ]


def pngs(engine: Engine, specs: list[JobSpec]) -> list[list[bytes]]:
    return [[encode(image, "png", 100) for image in images] for images in engine.generate(specs)]


def run(engine: Engine, requests: list[Request]) -> list[Event]:
    for request in requests:
        engine.submit(request)
    events = []
    while not engine.is_idle:
        events += engine.step()
    engine.check_integrity()
    return events


def pixels_of(events: list[Event]) -> dict[str, torch.Tensor]:
    return {event.image.request.id: event.pixels for event in events if isinstance(event, Rendered)}


SPECS = mixed_specs(24)


@pytest.fixture(scope="module")
def alone(model: GlmImage) -> list[list[bytes]]:
    """Run every request alone."""
    engine = small_engine(model)
    return [pngs(engine, [spec])[0] for spec in SPECS]


def test_all_at_once_gives_the_same_bytes(model: GlmImage, alone: list[list[bytes]]) -> None:
    engine = small_engine(model)
    assert pngs(engine, SPECS) == alone
    engine.check_integrity()


def test_random_arrival_gives_the_same_bytes(model: GlmImage, alone: list[list[bytes]]) -> None:
    """Submit in another order and at any step, with other sizes of tick and cache."""
    rng = random.Random(11)
    engine = small_engine(model, render_token_budget=700, kv_tokens=4000, max_images=10)
    waiting = list(enumerate(SPECS))
    rng.shuffle(waiting)
    got: dict[int, dict[int, bytes]] = {}
    while waiting or not engine.is_idle:
        while waiting and rng.random() < 0.03:
            index, spec = waiting.pop()
            engine.submit(Request(str(index), spec))
        for event in engine.step():
            assert not isinstance(event, Failed)
            if isinstance(event, Rendered):
                png = encode(event.pixels, "png", 100)
                got.setdefault(int(event.image.request.id), {})[event.image.index] = png
    assert [[got[i][k] for k in range(spec.n)] for i, spec in enumerate(SPECS)] == alone


def test_bfloat16_gives_the_same_bytes_in_any_batch(checkpoint) -> None:
    engine = small_engine(GlmImage.load(str(checkpoint), torch.device("cpu"), torch.bfloat16))
    specs = SPECS[:8]
    assert pngs(engine, specs) == [pngs(engine, [spec])[0] for spec in specs]


def test_bytes_do_not_depend_on_the_thread_that_steps(model: GlmImage, alone: list[list[bytes]]) -> None:
    """Step in a new thread, which begins with the number of torch threads that another one has just set."""
    engine = small_engine(model)
    with threads(1), ThreadPoolExecutor(1) as executor:
        assert executor.submit(pngs, engine, SPECS[:6]).result() == alone[:6]


def test_images_of_a_request_are_those_of_consecutive_seeds(model: GlmImage) -> None:
    """Share the blocks of a prompt, of which the last, partial one is copied for each image."""
    engine = small_engine(model)
    for prompt in ("x", "a prompt of another length", PROMPTS[1]):
        spec = JobSpec(prompt, 64, 64, seed=5, n=3, num_inference_steps=2)
        [together] = pngs(engine, [spec])
        assert together == [pngs(engine, [replace(spec, seed=seed, n=1)])[0][0] for seed in (5, 6, 7)]
        assert len(set(together)) == 3


def test_a_given_plan_is_rendered_without_planning(model: GlmImage) -> None:
    engine = small_engine(model)
    spec = JobSpec(PROMPTS[0], 96, 64, seed=9, num_inference_steps=3)
    events = run(engine, [Request("first", spec)])
    [plan] = [event.plan for event in events if isinstance(event, Planned)]
    tokens = engine.metrics.planner_tokens._value.get()
    again = run(
        engine, [Request("plan", replace(spec, plan=plan.to_dict())), Request("resumed", spec, plans={0: plan})]
    )
    assert engine.metrics.planner_tokens._value.get() == tokens
    assert not any(isinstance(event, Planned) for event in again)
    pixels = pixels_of(events + again)
    assert torch.equal(pixels["plan"], pixels["first"])
    assert torch.equal(pixels["resumed"], pixels["first"])


def test_strict_quotes_change_the_lettering_only(model: GlmImage) -> None:
    prompt = "mum's and dad's \"OPEN\" door"
    spec = JobSpec(prompt, 64, 64, seed=1, num_inference_steps=2, return_plan=True)
    strict = replace(spec, quotes="strict")
    engine = small_engine(model)
    assert pngs(engine, [spec]) != pngs(engine, [strict])
    requests = [Request(str(number), each) for number, each in enumerate((spec, strict))]
    first, second = [event.plan for event in run(small_engine(model), requests) if isinstance(event, Planned)]
    assert first == second
    plain = [replace(each, prompt="a 'red' \"OPEN\" door") for each in (spec, strict)]
    assert pngs(engine, plain[:1]) == pngs(engine, plain[1:])


def test_plans_hold_only_image_codes_and_fill_their_grids(model: GlmImage) -> None:
    engine = small_engine(model)
    hot = JobSpec("hot", 160, 96, seed=1, num_inference_steps=1, temperature=2.0, top_p=1.0)
    plans = [event.plan for event in run(engine, [Request("a", hot)]) if isinstance(event, Planned)]
    [plan] = plans
    assert (plan.rows, plan.cols, len(plan.tokens)) == (3, 5, 15)
    assert plan.preview is not None
    assert len(plan.preview.tokens) == plan.preview.rows * plan.preview.cols == Geometry(160, 96).preview.tokens
    assert max(plan.tokens + plan.preview.tokens) < model.planner.config.codebook_size


def test_odd_sizes_are_cut_from_the_middle_of_the_canvas(model: GlmImage) -> None:
    spec = JobSpec(PROMPTS[0], 96, 64, seed=3, num_inference_steps=2)
    engine = small_engine(model)
    [[whole]], [[cut]] = engine.generate([spec]), engine.generate([replace(spec, width=91, height=64)])
    assert cut.shape == (64, 91, 3)
    assert torch.equal(cut, whole[:, 2:93])


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": "x" * 3000}, "prompt", "at most 2048"),
        ({"prompt": "a <|image|> b"}, "prompt", "control tokens"),
        ({"prompt": f"'{'x' * 2000}'" * 5, "plan": {"rows": 2, "cols": 2, "tokens": [0] * 4}}, "prompt", "be rendered"),
        ({"plan": {"rows": 1, "cols": 2, "tokens": [0, 0]}}, "plan", "2 rows and 2 columns"),
        ({"plan": {"rows": 2, "cols": 2, "tokens": [0, 0, 0, 512]}}, "plan", "0 to 511"),
        ({"n": 9}, "n", "planner memory"),
    ],
)
def test_an_invalid_request_fails_alone_with_its_reason(
    model: GlmImage, change: dict, param: str, message: str
) -> None:
    engine = small_engine(model, kv_tokens=2400)
    good = JobSpec("good", 64, 64, seed=1, num_inference_steps=2)
    events = run(engine, [Request("good", good), Request("bad", replace(good, **change)), Request("good2", good)])
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request.id == "bad"
    assert isinstance(failed.error, RequestError)
    assert failed.error.param == param
    assert message in failed.error.message
    assert {event.request.id for event in events if isinstance(event, Finished)} == {"good", "good2"}


FOUR = [JobSpec(f"{i} 'w{i}'", 64, 64, seed=10 * i, num_inference_steps=6, n=1 + i % 2 * 2) for i in range(4)]
VICTIM = FOUR[3]


@pytest.fixture(scope="module")
def undisturbed(model: GlmImage) -> list[list[bytes]]:
    return pngs(small_engine(model), FOUR)


@pytest.mark.parametrize(
    "fault",
    [
        "tokenizer",
        "prefill",
        "decode",
        "read",
        "glyphs",
        "prepare",
        "prepare preview",
        "advance",
        "partial",
        "vae",
    ],
)
def test_a_failure_anywhere_ends_one_request_and_changes_no_other(
    model: GlmImage, undisturbed: list[list[bytes]], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail every batch with the victim, of three images, in it; each request is then tried alone."""
    engine = small_engine(model, render_token_budget=20_000)  # room for previews, so that they come first
    planner, renderer = engine.planner.runner, engine.renderer.runner
    with_partials = (2, 3) if fault in ("prepare preview", "partial") else ()
    target, name, prompts_of = {
        "tokenizer": (model.prompts, "encode", lambda prompt, *_: [prompt]),
        "prefill": (planner, "prefill", lambda groups: [g.request.spec.prompt for g in groups]),
        "decode": (planner, "decode", lambda items: [s.request.spec.prompt for s in items]),
        "read": (planner, "read", lambda sequence: [sequence.request.spec.prompt]),
        "glyphs": (model.glyphs, "encode_by_batch", lambda strings: [VICTIM.prompt] if "w3" in strings else []),
        "prepare": (renderer, "prepare", lambda image: [image.request.spec.prompt]),
        "prepare preview": (renderer, "prepare_preview", lambda image: [image.request.spec.prompt]),
        "advance": (renderer, "advance", lambda items: [r.request.spec.prompt for r in items]),
        "partial": (renderer, "decode", lambda rendering: [rendering.request.spec.prompt] * rendering.is_preview),
        "vae": (renderer, "decode", lambda rendering: [rendering.request.spec.prompt]),
    }[fault]
    real = getattr(target, name)

    def fails_for_the_victim(*args):
        if VICTIM.prompt in prompts_of(*args):
            raise RuntimeError("planted")
        return real(*args)

    monkeypatch.setattr(target, name, fails_for_the_victim)
    specs = [replace(spec, partial_images=int(i in with_partials)) for i, spec in enumerate(FOUR)]
    events = run(engine, [Request(str(i), spec) for i, spec in enumerate(specs)])
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request.id == "3"
    assert str(failed.error) == "planted"
    got: dict[str, list[bytes]] = {}
    for event in events:
        if isinstance(event, Rendered) and event.image.request is not failed.request:
            got.setdefault(event.image.request.id, []).append(encode(event.pixels, "png", 100))
    assert {number: set(images) for number, images in got.items()} == {str(i): set(undisturbed[i]) for i in range(3)}


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("device lost"), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_a_lost_device_fails_no_request_but_raises(
    model: GlmImage, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)

    def lost(items: list) -> None:
        raise error

    monkeypatch.setattr(engine.planner.runner, "prefill", lost)
    engine.submit(Request("a", SPECS[0]))
    with pytest.raises(type(error), match=str(error)):
        engine.step()


def test_a_request_past_its_deadline_is_not_begun_and_holds_up_no_other(model: GlmImage) -> None:
    """Let the deadline pass while the request waits for memory, ahead of another."""
    engine = small_engine(model, kv_tokens=400)
    first, late, last = (Request(name, replace(FOUR[0], seed=7)) for name in ("first", "late", "last"))
    for request in (first, late, last):
        engine.submit(request)
    events = engine.step()
    assert not any(isinstance(event, Failed) for event in events)
    late.deadline_at = time.monotonic()
    [failed] = [event for event in engine.step() if isinstance(event, Failed)]
    assert failed.request is late
    assert isinstance(failed.error, DeadlinePassed)
    events = run(engine, [])
    assert [event.request.id for event in events if isinstance(event, Finished)] == ["first", "last"]


@pytest.mark.parametrize("steps", [0, 1, 5, 150, 261, 262, 263])
def test_a_cancelled_request_frees_everything_within_a_step(model: GlmImage, steps: int) -> None:
    engine = small_engine(model)
    spec = JobSpec(PROMPTS[1], 64, 64, seed=0, n=2, num_inference_steps=40)
    engine.submit(Request("gone", spec))
    for _ in range(steps):
        engine.step()
    engine.cancel("gone")
    engine.cancel("never existed")
    assert not any(isinstance(event, Finished | Failed) for event in engine.step())
    assert engine.is_idle
    engine.check_integrity()


def test_progress_grows_and_ends_complete(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.engine.PROGRESS_SECONDS", 0.0)
    events = run(small_engine(model), [Request("a", JobSpec("x", 64, 64, seed=0, n=2, num_inference_steps=4))])
    reports = [(e.phase, e.step, e.steps) for e in events if isinstance(e, Progress)]
    planning = [step for phase, step, _ in reports if phase == "planning"]
    rendering = [step for phase, step, _ in reports if phase == "rendering"]
    assert planning == sorted(planning)
    assert rendering == sorted(rendering)
    assert {steps for phase, _, steps in reports if phase == "planning"} == {2 * Geometry(64, 64).plan_tokens}
    assert {steps for phase, _, steps in reports if phase == "rendering"} == {8}


def test_requests_that_do_not_fit_are_served_in_order(model: GlmImage) -> None:
    """Give the cache room for one plan at a time."""
    engine = small_engine(model, kv_tokens=400)
    specs = [JobSpec(f"{i}", 64, 64, seed=i, num_inference_steps=1) for i in range(4)]
    events = run(engine, [Request(str(i), spec) for i, spec in enumerate(specs)])
    assert [event.request.id for event in events if isinstance(event, Planned)] == ["0", "1", "2", "3"]
    assert [event.request.id for event in events if isinstance(event, Finished)] == ["0", "1", "2", "3"]


def test_given_plan_with_wrong_count_is_refused_before_it_is_rendered(model: GlmImage) -> None:
    plan = Plan(2, 2, [0, 0, 0])
    events = run(small_engine(model), [Request("a", JobSpec("x", 64, 64, seed=0), plans={0: plan})])
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Failed]
