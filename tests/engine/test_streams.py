"""Both stages at once, on a simulated device: what is in flight, in which order, and what comes of it."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.renderer.in_flight import TICKS_BESIDE_DECODING
from engine.request import Event, Failed, Finished, Partial, Rendered, Request
from engine.streams import HostStreams
from models.errors import NonFiniteError
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.simulated_streams import Races, SimulatedStreams
from tests.source_images import source_image, source_images

SPECS = [
    JobSpec('a poster "HELLO"', 64, 64, seed=1, num_inference_steps=5),
    JobSpec("plain", 96, 64, seed=2, num_inference_steps=2, n=2),
    JobSpec("red 'A'", 64, 128, seed=3, num_inference_steps=7, guidance_scale=1.0),
    JobSpec("an edit", 64, 64, seed=4, num_inference_steps=3, num_sources=1, partial_images=1),
    JobSpec("late", 128, 64, seed=5, num_inference_steps=4),
]


def simulated_engine(model: GlmImage, seed: int, speed: float) -> tuple[Engine, SimulatedStreams]:
    streams = SimulatedStreams(random.Random(seed), speed)
    return Engine(model, EngineLimits.choose(model, render_token_budget=700), streams=streams), streams


def requests_of(engine: Engine, specs: list[JobSpec]) -> list[Request]:
    requests = []
    for number, spec in enumerate(specs):
        sources = source_images(source_image(number, 64, 64)) if spec.num_sources else None
        preprocessed = engine.preprocess_images(sources) if sources else []
        requests.append(Request(str(number), spec, source_images=sources, preprocessed=preprocessed))
    return requests


def run(
    engine: Engine,
    requests: list[Request],
    chance: random.Random | None = None,
    between: Callable[[], object] = lambda: None,
    events: list[Event] | None = None,
) -> list[Event]:
    """Submit requests at the start, or by `chance` one after another. Events are added to `events`."""
    waiting, events = requests[::-1], [] if events is None else events
    while waiting or not engine.is_idle:
        while waiting and (chance is None or chance.random() < 0.05):
            engine.submit(waiting.pop())
        events += engine.step()
        between()
    engine.check_integrity()
    return events


def images(results: dict[tuple[str, str, int], torch.Tensor]) -> set[tuple[str, str, int]]:
    """Leave out partial images, which depend on when they are due."""
    return {key for key in results if key[0] == "image"}


def results(events: list[Event]) -> dict[tuple[str, str, int], torch.Tensor]:
    """Return the pixels of images and partial images."""
    images = {("image", e.request.id, e.image.index): e.pixels for e in events if isinstance(e, Rendered)}
    partials = {(f"partial {e.index}", e.request.id, e.image.index): e.pixels for e in events if isinstance(e, Partial)}
    return images | partials


@pytest.fixture(scope="module")
def expected(model: GlmImage) -> dict[tuple[str, str, int], torch.Tensor]:
    engine = small_engine(model)
    return results(run(engine, requests_of(engine, SPECS)))


@pytest.mark.parametrize(("seed", "speed"), [(0, 0.02), (1, 0.3)])
def test_images_are_read_when_they_are_done_in_any_order_of_the_device(
    model: GlmImage, expected: dict[tuple[str, str, int], torch.Tensor], seed: int, speed: float
) -> None:
    engine, streams = simulated_engine(model, seed, speed)
    with Races(streams) as races:
        events = run(engine, requests_of(engine, SPECS), streams.chance)
    assert not races.found
    assert races.shared, "latents go to the decoder, codes of source images to the planner"
    got = results(events)
    assert images(got) == images(expected)
    assert all(torch.equal(got[key], expected[key]) for key in images(expected) | {("partial 0", "3", 0)})
    for request in range(len(SPECS)):
        kinds = [type(e) for e in events if e.request.id == str(request)]
        assert kinds.index(Finished) == len(kinds) - 1


@pytest.mark.parametrize(("seed", "speed"), [(3, 0.02), (4, 0.3)])
def test_the_host_is_one_tick_ahead_and_decoding_two_behind(model: GlmImage, seed: int, speed: float) -> None:
    """Count from the order in which marks were made and reached."""
    engine, streams = simulated_engine(model, seed, speed)
    stage, launched, decoded = engine.renderer, list[Any](), list[Any]()
    add, begin = stage._ticks.add, stage._decodings.begin

    def add_tick(*arguments: Any) -> None:
        add(*arguments)
        launched.append(stage._ticks._ticks[-1].ended)
        assert sum(not mark.has_run for mark in launched) <= 2, "one runs, one follows"

    def begin_decoding(*arguments: Any) -> None:
        begin(*arguments)
        decoded.append((len(launched), stage._decodings._decodings[-1].done))

    stage._ticks.add, stage._decodings.begin = add_tick, begin_decoding  # type: ignore[method-assign]
    run(engine, requests_of(engine, SPECS), streams.chance)
    assert len(decoded) == 6 + 1, "six images, and a partial one"
    for ticks, done in decoded:
        for later_tick in launched[ticks + TICKS_BESIDE_DECODING :]:
            assert follows(later_tick, done), "a tick begins only after what was decoded long before"


def follows(mark: Any, other: Any) -> bool:
    """Return whether the device reaches `mark` after `other` in any order: its clock contains the other's."""
    return all(mark.clock.get(lane, 0) >= count for lane, count in other.clock.items())


def test_a_step_plans_beneath_a_tick_and_launches_the_next_before_it_ends(model: GlmImage) -> None:
    engine, streams = simulated_engine(model, 0, speed=0.0)
    order: list[str] = []
    plan, advance = engine.planner.step, engine.renderer.runner.advance
    engine.planner.step = lambda: (order.append(f"plan on {streams.lane}"), plan())  # type: ignore[method-assign]
    engine.renderer.runner.advance = lambda batch: (order.append(f"tick on {streams.lane}"), advance(batch))  # type: ignore
    long, short = replace(SPECS[2], num_inference_steps=40, width=256), replace(SPECS[4], num_inference_steps=1)
    [first] = requests_of(engine, [long])
    engine.submit(first)
    while len(engine.renderer.scheduler) == 0:
        engine.step()
    for _ in range(3):
        engine.step()
    streams.log.clear()
    order.clear()
    engine.submit(Request("second", short))
    engine.step()
    engine.step()
    assert set(order) == {"plan on planner", "tick on renderer"}
    assert order[-1] == "tick on renderer"
    waits = [lane for event, lane in streams.log if event == "wait"]
    assert waits == ["renderer"] * order.count("tick on renderer"), "for the tick before the last"
    engine.cancel("0")
    run(engine, [])


@pytest.mark.parametrize(("steps", "speed"), [(3, 0.5), (60, 0.0)])
def test_a_request_that_is_cancelled_in_flight_changes_no_other(
    model: GlmImage, expected: dict[tuple[str, str, int], torch.Tensor], steps: int, speed: float
) -> None:
    engine, streams = simulated_engine(model, steps, speed)
    gone, *others = requests_of(engine, SPECS)
    for request in (gone, *others):
        engine.submit(request)
    with Races(streams) as races:
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(gone.id)
        before = len(events)
        events += run(engine, [])
    assert not races.found
    assert not any(event.request is gone for event in events[before:])
    assert {key for key in images(expected) if key[1] != gone.id} <= results(events).keys()
    got = results(events)
    for key, pixels in expected.items():
        assert key[0] != "image" or key[1] == gone.id or torch.equal(got[key], pixels)


@pytest.mark.parametrize("moment", ["planned", "ticking", "decoded"])
def test_cancelling_leaves_nothing(model: GlmImage, moment: str) -> None:
    engine, _ = simulated_engine(model, 0, speed=0.0)
    [request] = requests_of(engine, SPECS[4:])
    stage = engine.renderer
    engine.submit(request)
    has_come = {
        "planned": lambda: not engine.planner.is_idle,
        "ticking": lambda: len(stage._ticks._ticks) == 2,
        "decoded": lambda: len(stage._decodings) > 0,
    }[moment]
    while not has_come():
        engine.step()
    engine.cancel(request.id)
    assert not engine.step()
    assert engine.is_idle
    engine.check_integrity()


def test_no_image_is_reported_before_the_device_is_done(model: GlmImage) -> None:
    engine, streams = simulated_engine(model, 0, speed=0.0)
    finished: list[int] = []

    def count() -> None:
        finished.append(sum(event == ("done", "decoder") for event in streams.log))

    events = run(engine, requests_of(engine, SPECS[1:3]), between=count)
    assert len([e for e in events if isinstance(e, Rendered)]) == 3 == finished[-1]
    assert [wait for wait in streams.log if wait == ("wait", "decoder")], "an idle engine waits, it does not spin"


def test_a_device_that_fails_a_tick_late_fails_no_request_but_raises(model: GlmImage) -> None:
    """Any request may be the cause: none is blamed, the process ends, and jobs are requeued to run alone."""
    engine, streams = simulated_engine(model, 0, speed=0.0)
    for request in requests_of(engine, SPECS):
        engine.submit(request)
    while len(engine.renderer._ticks._ticks) < 2:
        engine.step()
    streams.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    events: list[Event] = []
    with pytest.raises(torch.AcceleratorError):
        run(engine, [], events=events)
    assert not any(isinstance(event, Failed) for event in events)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), ValueError("planted")])
@pytest.mark.parametrize("name", ["advance", "decode"])
def test_what_fails_to_launch_ends_its_request_alone_beside_others_in_flight(
    model: GlmImage, expected: dict[tuple[str, str, int], torch.Tensor], name: str, error: Exception
) -> None:
    engine, _ = simulated_engine(model, 1, speed=0.1)
    runner = engine.renderer.runner
    real = getattr(runner, name)

    def fail(items: Any) -> Any:
        if any(item.request.id == "2" for item in (items if isinstance(items, list) else [items])):
            raise error
        return real(items)

    setattr(runner, name, fail)
    events = run(engine, requests_of(engine, SPECS))
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request.id, failed.error) == ("2", error)
    got = results(events)
    assert all(torch.equal(got[key], expected[key]) for key in images(expected) if key[1] != "2")


def test_an_image_that_is_not_finite_fails_when_it_is_read(
    model: GlmImage, expected: dict[tuple[str, str, int], torch.Tensor]
) -> None:
    engine, _ = simulated_engine(model, 1, speed=0.1)
    real = engine.renderer.runner.advance

    def advance(renderings: list[Any]) -> None:
        real(renderings)
        for rendering in renderings:
            if rendering.request.id == "1":
                rendering.latents = rendering.latents * torch.nan

    engine.renderer.runner.advance = advance  # type: ignore[method-assign]
    events = run(engine, requests_of(engine, SPECS))
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request.id == "1"
    assert isinstance(failed.error, NonFiniteError)
    got = results(events)
    assert all(torch.equal(got[key], expected[key]) for key in images(expected) if key[1] != "1")


# --- the detector of races, and the host's streams


class Racing(SimulatedStreams):
    """Streams that leave out what keeps memory safe."""

    def keep(self, tensor: torch.Tensor | None, lane: Any) -> None: ...


class Unordered(SimulatedStreams):
    def follow(self, lane: Any, leader: Any) -> None: ...


@pytest.mark.parametrize(("kind", "found"), [(Racing, "which may free it"), (Unordered, "may not have written yet")])
def test_races_are_noticed(model: GlmImage, kind: type[SimulatedStreams], found: str) -> None:
    streams = kind(random.Random(0), 0.1)
    engine = Engine(model, EngineLimits.choose(model), streams=streams)
    with Races(streams) as races:
        run(engine, requests_of(engine, SPECS[:1]))
    assert any(found in race for race in races.found)


def test_on_a_cpu_every_step_reports_what_it_has_done(model: GlmImage) -> None:
    engine = Engine(model, streams=HostStreams())
    [request] = requests_of(engine, [replace(SPECS[2], num_inference_steps=3)])
    engine.submit(request)
    ticks = partial(engine.metrics.registry.get_sample_value, "glimmer_renderer_step_seconds_count")
    counts: list[float] = []
    while not engine.is_idle:
        engine.step()
        counts.append(ticks() or 0.0)
    assert counts[-4:] == [0.0, 1.0, 2.0, 3.0]
