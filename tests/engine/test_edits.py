"""Edits in the engine: they share batches with other requests, and images do not depend on their batch."""

import random
from dataclasses import replace

import pytest
import torch

from engine.engine import Engine
from engine.errors import RequestError
from engine.jobs.job import JobSpec, SourceImages
from engine.request import Event, Failed, Finished, Planned, Progress, Rendered, Request
from engine.worker.encoding import encode
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.source_images import png, source_image, source_images

pytestmark = pytest.mark.usefixtures("two_threads")

Work = tuple[JobSpec, SourceImages | None]


def mixed_work(count: int) -> list[Work]:
    """Make edits of one to three images, and generations, of several sizes."""
    rng = random.Random(5)
    work: list[Work] = []
    for number in range(count):
        spec = JobSpec(
            rng.choice(["make it 'RED'", "another \"one\" 'B'", "plain"]),
            width=rng.choice([64, 96, 100]),
            height=rng.choice([64, 90, 128]),
            seed=rng.randrange(2**32),
            n=rng.choice([1, 1, 2]),
            num_inference_steps=rng.choice([2, 3, 5]),
            guidance_scale=rng.choice([1.0, 1.5, 4.0]),
            temperature=rng.choice([None, 0.0]),
        )
        images = [
            source_image(rng.randrange(1000), rng.choice([64, 96, 106]), rng.choice([64, 128]))
            for _ in range(rng.choice([1, 2, 3]) if number % 3 else 0)
        ]
        work.append((replace(spec, num_sources=len(images)), source_images(*images) if images else None))
    return work


def request(engine: Engine, name: str, spec: JobSpec, given: SourceImages | None) -> Request:
    return Request(name, spec, source_images=given, preprocessed=engine.preprocess_images(given) if given else [])


def pngs(engine: Engine, work: list[Work]) -> list[list[bytes]]:
    results = engine.generate([spec for spec, _ in work], [given for _, given in work])
    engine.check_integrity()
    return [[encode(image, "png", 100) for image in images] for images in results]


def run(engine: Engine, requests: list[Request]) -> list[Event]:
    for one in requests:
        engine.submit(one)
    events: list[Event] = []
    while not engine.is_idle:
        events += engine.step()
    engine.check_integrity()
    return events


WORK = mixed_work(12)
EDIT = JobSpec("make it 'RED'", 64, 96, seed=3, num_inference_steps=3, num_sources=1)


@pytest.fixture(scope="module")
def alone(model: GlmImage) -> list[list[bytes]]:
    """Run every request alone."""
    engine = small_engine(model)
    return [pngs(engine, [work])[0] for work in WORK]


def test_all_at_once_gives_the_same_bytes(model: GlmImage, alone: list[list[bytes]]) -> None:
    assert pngs(small_engine(model), WORK) == alone


def test_random_arrival_gives_the_same_bytes(model: GlmImage, alone: list[list[bytes]]) -> None:
    """Submit in another order and at any step, with little memory for source images and another tick size."""
    rng = random.Random(13)
    engine = small_engine(model, render_token_budget=600, source_patches=200, max_images=6)
    waiting = list(enumerate(WORK))
    rng.shuffle(waiting)
    got: dict[int, dict[int, bytes]] = {}
    while waiting or not engine.is_idle:
        while waiting and rng.random() < 0.05:
            number, (spec, given) = waiting.pop()
            engine.submit(request(engine, str(number), spec, given))
        for event in engine.step():
            assert not isinstance(event, Failed)
            if isinstance(event, Rendered):
                image = event.image
                got.setdefault(int(image.request.id), {})[image.index] = encode(event.pixels, "png", 100)
    engine.check_integrity()
    assert [[got[i][k] for k in range(spec.n)] for i, (spec, _) in enumerate(WORK)] == alone


def test_bfloat16_gives_the_same_bytes_in_any_batch(checkpoint) -> None:
    engine = small_engine(GlmImage.load(str(checkpoint), torch.device("cpu"), torch.bfloat16))
    work = WORK[:5]
    assert pngs(engine, work) == [pngs(engine, [one])[0] for one in work]


def test_images_of_an_edit_share_their_source_images(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, given = small_engine(model), source_images(source_image(1, 96, 64), source_image(2, 64, 64))
    spec = replace(EDIT, n=3, num_sources=2)
    separately = [pngs(engine, [(replace(spec, seed=seed, n=1), given)])[0][0] for seed in (3, 4, 5)]
    read: list[int] = []
    real = model.renderer.read_source
    monkeypatch.setattr(model.renderer, "read_source", lambda x, *rest: (read.append(len(x)), real(x, *rest))[1])
    [together] = pngs(engine, [(spec, given)])
    assert together == separately
    assert len(set(together)) == 3
    assert len(read) == 2


def test_source_images_and_their_order_change_the_result(model: GlmImage) -> None:
    engine, first, second = small_engine(model), source_image(1, 64, 64), source_image(2, 64, 64)
    spec = replace(EDIT, num_sources=2)
    results = pngs(
        engine,
        [
            (spec, source_images(first, second)),
            (spec, source_images(second, first)),
            (spec, source_images(first, first)),
        ],
    )
    assert len({images[0] for images in results}) == 3


def test_an_edit_writes_its_plan_without_a_preview(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.engine.PROGRESS_SECONDS", 0.0)
    engine, given = small_engine(model), source_images(source_image(1, 96, 64))
    events = run(engine, [request(engine, "edit", EDIT, given)])
    [plan] = [event.plan for event in events if isinstance(event, Planned)]
    assert plan.preview is None
    assert (plan.rows, plan.cols, len(plan.tokens)) == (3, 2, 6)
    seen = [(e.phase, e.steps) for e in events if isinstance(e, Progress)]
    assert {steps for phase, steps in seen if phase == "planning"} == {6}


@pytest.mark.parametrize("how", ["spec", "checkpoint"])
def test_a_known_plan_of_an_edit_is_rendered_to_the_same_bytes(model: GlmImage, how: str) -> None:
    engine, given = small_engine(model), source_images(source_image(1, 96, 64))
    events = run(engine, [request(engine, "first", EDIT, given)])
    [plan] = [event.plan for event in events if isinstance(event, Planned)]
    written = engine.metrics.planner_tokens._value.get()
    again = request(engine, "second", replace(EDIT, plan=plan.to_dict()) if how == "spec" else EDIT, given)
    again.plans = {} if how == "spec" else {0: plan}
    events += run(engine, [again])
    assert engine.metrics.planner_tokens._value.get() == written
    first, second = (event.pixels for event in events if isinstance(event, Rendered))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "sizes", "param", "message"),
    [
        ({"prompt": "x" * 3000}, [(64, 64)], "prompt", "3[0-9]{3} tokens; this server takes at most 2048"),
        ({"prompt": "a <|image|> b"}, [(64, 64)], "prompt", "control tokens"),
        ({"num_sources": 2}, [(64, 64)], None, "this edit of 2 images came with 1"),
        ({"num_sources": 3}, [(128, 128)] * 3, "image", "49152 pixels, as the model sees them; .* room for 40960"),
        ({"plan": {"rows": 1, "cols": 2, "tokens": [0, 0]}}, [(64, 64)], "plan", "3 rows and 2 columns"),
    ],
)
def test_an_invalid_edit_fails_alone_with_its_reason(
    model: GlmImage, change: dict, sizes: list[tuple[int, int]], param: str | None, message: str
) -> None:
    engine = small_engine(model, source_patches=160)
    good = source_images(source_image(1, 96, 64))
    bad = source_images(*[source_image(2, *size) for size in sizes])
    events = run(
        engine,
        [
            request(engine, "good", EDIT, good),
            request(engine, "bad", replace(EDIT, **change), bad),
            request(engine, "good2", EDIT, good),
        ],
    )
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request.id == "bad"
    assert isinstance(failed.error, RequestError)
    assert failed.error.param == param
    with pytest.raises(RequestError, match=message):
        raise failed.error
    assert {event.request.id for event in events if isinstance(event, Finished)} == {"good", "good2"}


def test_codes_of_source_images_do_not_count_as_prompt(model: GlmImage) -> None:
    engine = small_engine(model, max_prompt_tokens=80)
    given = source_images(source_image(1, 512, 512))  # 256 codes
    events = run(engine, [request(engine, "edit", EDIT, given)])
    assert [type(event) for event in events if isinstance(event, Failed | Finished)] == [Finished]


@pytest.mark.parametrize("fault", ["vision", "encoder", "sources", "prefill", "advance"])
def test_a_failure_anywhere_ends_one_edit_and_changes_no_other(
    model: GlmImage, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)
    given = [source_images(source_image(number, 64, 64 + 32 * number)) for number in range(3)]
    work: list[Work] = [(replace(EDIT, seed=number, n=2), given[number]) for number in range(3)]
    expected = pngs(engine, work)
    requests = [request(engine, str(number), *one) for number, one in enumerate(work)]
    victim = requests[1]
    pixels = victim.preprocessed[0].pixels
    target, name, is_victim = {
        "vision": (model.vision, "forward", lambda image: image.pixels is pixels),
        "encoder": (model.autoencoder, "encode", lambda argument: argument is pixels),
        "sources": (engine.renderer.runner.source_kv, "of", lambda request: request is victim),
        "prefill": (engine.planner.runner, "prefill", lambda groups: victim in [g.request for g in groups]),
        "advance": (engine.renderer.runner, "advance", lambda items: victim in [r.request for r in items]),
    }[fault]
    real = getattr(target, name)

    def fails_for_the_victim(argument):
        if is_victim(argument):
            raise torch.OutOfMemoryError("planted")
        return real(argument)

    monkeypatch.setattr(target, name, fails_for_the_victim)
    events = run(engine, requests)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request is victim
    for number in (0, 2):
        got = [e.pixels for e in events if isinstance(e, Rendered) and e.image.request is requests[number]]
        assert sorted(encode(image, "png", 100) for image in got) == sorted(expected[number])


@pytest.mark.parametrize("steps", [0, 1, 4, 8, 12])
def test_a_cancelled_edit_frees_everything_within_a_step(model: GlmImage, steps: int) -> None:
    engine = small_engine(model)
    engine.submit(
        request(engine, "gone", replace(EDIT, n=2, num_inference_steps=40), source_images(source_image(1, 96, 96)))
    )
    for _ in range(steps):
        engine.step()
    assert len(engine.renderer.runner.source_kv) == (steps > 2)  # the source image's codes and latents, then its layers
    engine.cancel("gone")
    assert not any(isinstance(event, Finished | Failed) for event in engine.step())
    assert engine.is_idle
    engine.check_integrity()
    assert engine.renderer.runner._packed is None


def test_edits_whose_source_images_do_not_fit_are_served_in_order(model: GlmImage) -> None:
    """Give room for the keys and values of one edit at a time."""
    engine = small_engine(model, source_patches=30)
    given = source_images(source_image(1, 64, 96))  # 24 patches
    requests = [request(engine, str(number), replace(EDIT, seed=number), given) for number in range(4)]
    for one in requests:
        engine.submit(one)
    finished: list[str] = []
    while not engine.is_idle:
        finished += [event.request.id for event in engine.step() if isinstance(event, Finished)]
        assert len(engine.renderer.runner.source_kv) <= 1
        assert len({sequence.request for sequence in engine.planner.scheduler.sequences}) <= 1
    assert finished == ["0", "1", "2", "3"]
    engine.check_integrity()


def test_a_source_image_that_cannot_be_edited_names_its_field(model: GlmImage) -> None:
    for file in (b"no image", png(source_image(1, 400, 20))):
        with pytest.raises(RequestError, match="a source image") as caught:
            small_engine(model).preprocess_images(SourceImages([file]))
        assert (caught.value.param, caught.value.code) == ("image", "invalid_image_file")
