"""Look-ahead: fewer passes, the same plans."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.engine import Engine
from engine.geometry import Grid
from engine.jobs.job import JobSpec, SourceImages
from engine.planner.buffers import SequenceBuffers
from engine.planner.lookahead import LookAhead, guess_sources
from engine.planner.scheduler import MAX_ROWS, Sequence
from engine.request import Failed, Planned, Request
from engine.worker.encoding import encode
from models.glm_image.model import GlmImage
from models.nano import CHECKPOINT
from tests.checkpoints import small_engine
from tests.source_images import source_image, source_images

Share = Callable[[list[Sequence]], None]
Work = tuple[JobSpec, SourceImages | None]
Plans = dict[tuple[str, int], list[int]]


def mixed_work(count: int, seed: int) -> list[Work]:
    """Return requests of many sizes and settings; a third of them edits."""
    rng = random.Random(seed)
    work: list[Work] = []
    for number in range(count):
        spec = JobSpec(
            rng.choice(["a poster", "red 'A' and \"BB\" " * 5, "x"]),
            width=rng.choice([64, 96, 160]),
            height=rng.choice([64, 90, 128]),
            seed=rng.randrange(2**32),
            n=rng.choice([1, 1, 3]),
            temperature=rng.choice([None, 0.0, 0.0, 0.02]),
            top_p=rng.choice([None, 0.1]),
            num_inference_steps=1,
        )
        images = [source_image(number, 64, 96)] * rng.choice([1, 2]) if number % 3 == 0 else []
        work.append((replace(spec, num_sources=len(images)), source_images(*images) if images else None))
    return work


def plans_of(engine: Engine, work: list[Work], rng: random.Random | None = None, first: int = 0) -> Plans:
    """Plan requests `first`, ... at once; or with `rng` when it says, cancelling some of those divisible by five."""
    waiting = list(enumerate(work, first))[::-1]
    plans: Plans = {}
    while waiting or not engine.is_idle:
        while waiting and (rng is None or rng.random() < 0.2):
            number, (spec, given_images) = waiting.pop()
            preprocessed = engine.preprocess_images(given_images) if given_images else []
            engine.submit(Request(str(number), spec, source_images=given_images, preprocessed=preprocessed))
        if rng is not None and rng.random() < 0.02:
            engine.cancel(str(5 * rng.randrange(len(work) // 5 + 1)))
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Planned):
                grids = ([event.plan.preview] if event.plan.preview else []) + [event.plan]
                plans[event.request.id, event.index] = [token for grid in grids for token in grid.tokens]
                if event.request.is_planned:
                    engine.cancel(event.request.id)
    engine.check_integrity()
    return plans


def engine_with(model: GlmImage, share: Share, **limits: int) -> Engine:
    engine = small_engine(model, **limits)
    engine.planner.look_ahead.share = lambda sequences, **_: share(sequences)
    return engine


def fixed(rows: int) -> Share:
    def share(sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.rows = min(rows, sequence.max_rows)

    return share


def at_random(rng: random.Random) -> Share:
    def share(sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.rows = rng.randint(1, sequence.max_rows)

    return share


WORK = mixed_work(10, seed=1)


@pytest.fixture(scope="module")
def sequential(model: GlmImage) -> Plans:
    """Plan each request alone, token by token."""
    engine = engine_with(model, fixed(1))
    plans: Plans = {}
    for number, work in enumerate(WORK):
        plans |= plans_of(engine, [work], first=number)
    return plans


@pytest.mark.parametrize("rows", [5, 16])
def test_plans_are_the_same_at_any_number_of_rows(model: GlmImage, sequential: Plans, rows: int) -> None:
    assert plans_of(engine_with(model, fixed(rows)), WORK) == sequential


@pytest.mark.parametrize("seed", range(2))
def test_plans_are_the_same_in_any_order_beside_cancelled_ones(model: GlmImage, sequential: Plans, seed: int) -> None:
    rng = random.Random(seed)
    engine = engine_with(model, at_random(rng), max_images=10, kv_tokens=6000)
    plans = plans_of(engine, WORK, rng)
    assert plans == {key: tokens for key, tokens in sequential.items() if key in plans}
    assert {key for key in sequential if int(key[0]) % 5} <= set(plans)


def test_the_shipped_checkpoint_needs_less_than_half_the_passes() -> None:
    engine = engine_with(GlmImage.load(str(CHECKPOINT), torch.device("cpu"), torch.float32), fixed(16))
    spec = JobSpec('a blue poster, top headline "GLIMMER", center a large yellow star', 256, 256, seed=1)
    [tokens] = plans_of(engine, [(spec, None)]).values()
    metrics = engine.metrics
    passes = metrics.registry.get_sample_value("glimmer_planner_accepted_tokens_count")
    accepted = metrics.registry.get_sample_value("glimmer_planner_accepted_tokens_sum")
    assert passes is not None
    assert passes < len(tokens) / 2
    assert accepted == len(tokens) - 1, "the first token comes from the prompt"
    assert metrics.planner_tokens._value.get() == len(tokens)
    assert passes < metrics.lookahead_rows._value.get() <= 15 * passes


def test_edits_guess_that_the_source_image_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    nano = GlmImage.load(str(CHECKPOINT), torch.device("cpu"), torch.float32)
    poster = JobSpec(
        'a blue poster, headline "SALE", a yellow star, footer "NOW" on a red bar',
        256,
        256,
        seed=1,
        num_inference_steps=4,
    )
    [[pixels]] = Engine(nano).generate([poster])
    file = encode(pixels, "png", 100)
    work: list[Work] = [
        (JobSpec(prompt, 256, 256, seed=2, num_sources=1), SourceImages([file]))
        for prompt in ("make the star red", 'change the headline to "OPEN"', "make the background green")
    ]

    def passes() -> tuple[Plans, float]:
        engine = engine_with(nano, fixed(16))
        plans = plans_of(engine, work)
        return plans, engine.metrics.registry.get_sample_value("glimmer_planner_accepted_tokens_count") or 0

    plans, fewer = passes()
    monkeypatch.setattr(SequenceBuffers, "_guess_source", lambda self, sequence: None)
    from_above, more = passes()
    assert plans == from_above
    assert fewer < more


def test_a_guess_that_overflows_changes_no_plan(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess a code whose embedding is infinite, which no plan contains."""
    work = WORK[1:3]
    expected = plans_of(engine_with(model, fixed(1)), work)
    written = {token for tokens in expected.values() for token in tokens}
    bad = next(code for code in range(model.planner.config.codebook_size) if code not in written)
    engine = engine_with(model, fixed(8))
    step = engine.planner.runner.step
    read, overflows = step._tokens, list[bool]()

    def guess(lines: Tensor, steps: Tensor) -> Tensor:
        is_guess = (steps >= step.buffers.written[lines]) & (steps > 40)
        overflows.append(bool(is_guess.any()))
        return read(lines, steps).masked_fill(is_guess, bad)

    monkeypatch.setattr(step, "_tokens", guess)
    embed = model.planner.embed_tokens.forward
    monkeypatch.setattr(
        model.planner.embed_tokens,
        "forward",
        lambda tokens: embed(tokens).masked_fill((tokens == bad)[:, None], float("inf")),
    )
    assert plans_of(engine, work) == expected
    assert any(overflows)


# --- rows


def sequences(*states: tuple[int, float]) -> list[Sequence]:
    """Return plans of 64x64 with tokens left and agreement."""
    made: list[Sequence] = []
    for index, (left, agreement) in enumerate(states):
        request = Request("r", JobSpec("p", 64, 64, seed=0))
        sequence = Sequence(request.images[0], 5, index, [], agreement=agreement)
        sequence.written = sequence.total - left
        made.append(sequence)
    return made


@given(
    states=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), max_size=40),
    seconds=st.lists(st.floats(0.001, 1), min_size=3, max_size=3),
)
def test_rows_fill_a_tile_and_stay_within_their_plans(states: list[tuple[int, float]], seconds: list[float]) -> None:
    plans = sequences(*states)
    LookAhead(dict(zip((4, 8, 16), sorted(seconds), strict=True))).share(plans)
    assert all(1 <= plan.rows <= min(MAX_ROWS, plan.total - plan.written) for plan in plans)
    assert sum(plan.rows for plan in plans) <= max(16, -(-len(plans) // 16) * 16)


def test_rows_go_where_they_bring_most() -> None:
    look_ahead = LookAhead({4: 1.0, 8: 1.1, 16: 1.3})
    cases: list[tuple[list[tuple[int, float]], list[int]]] = [
        ([(100, 0.99)], [16]),
        ([(3, 0.99)], [3]),
        ([(100, 0.05)], [1]),
        ([(100, 0.9), (100, 0.9)], [8, 8]),
        ([(100, 0.9), (100, 0.05)], [15, 1]),
        ([(100, 0.9)] * 16, [1] * 16),
        ([(100, 0.9)] * 31, [2] + [1] * 30),
    ]
    for states, expected in cases:
        plans = sequences(*states)
        look_ahead.share(plans)
        assert [plan.rows for plan in plans] == expected
        look_ahead.share(plans, memory_is_short=True)
        assert {plan.rows for plan in plans} == {1}
    LookAhead({}).share(plans := sequences((100, 0.9)))
    assert plans[0].rows == 1


def test_passes_that_cost_too_much_are_not_made_larger() -> None:
    [plan] = sequences((100, 0.9))
    LookAhead({4: 1.0, 8: 10.0, 16: 20.0}).share([plan])
    assert plan.rows == 4


def test_guesses_come_from_the_preview_or_from_above() -> None:
    edit, plan = guess_sources((Grid(2, 3),)), guess_sources((Grid(2, 2), Grid(4, 2)))
    assert edit == [0, 0, 0, 0, 1, 2]
    assert plan == [0, 0, 0, 1, *(0, 1, 0, 1, 2, 3, 2, 3)]
    for grids in ((Grid(16, 16), Grid(8, 8)), (Grid(8, 32), Grid(16, 64)), (Grid(5, 7),)):
        assert all(0 <= source <= max(0, token - 1) for token, source in enumerate(guess_sources(grids)))
