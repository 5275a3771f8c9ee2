"""The token budget that an engine measures when it starts."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.engine import Engine
from engine.renderer import calibration
from engine.renderer.calibration import SLACK, Point, knee
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_worker import SPEC

TOKENS = [500 * count for count in (1, 2, 3, 4, 6, 8, 12, 16)]


@given(st.sampled_from(TOKENS), st.floats(1e-6, 1e-3), st.floats(0.0, 0.08), st.randoms())
def test_the_knee_is_where_a_device_is_full(full: int, per_token: float, noise: float, random: object) -> None:
    """Time a device that does up to `full` tokens in the time of as many."""
    uniform = random.uniform  # type: ignore[attr-defined]
    points = [(tokens, per_token * max(full, tokens) * uniform(1, 1 + noise)) for tokens in TOKENS]
    found = knee(points)
    assert full / 1.35 <= found <= full


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1e3)), min_size=1, max_size=12))
def test_no_other_budget_is_much_cheaper(points: list[Point]) -> None:
    budget = knee(points)
    chosen = min(seconds for tokens, seconds in points if tokens == budget)
    assert all(chosen / budget <= SLACK * seconds / tokens * (1 + 1e-9) for tokens, seconds in points)


@pytest.fixture
def engine(model: GlmImage) -> Engine:
    return small_engine(model)


def test_a_budget_is_measured_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.renderer.calibrate(tmp_path)
    budget = engine.renderer.scheduler.token_limit.maximum
    assert budget > 0
    engine.check_integrity()

    def measure(*_: object) -> list[Point]:
        pytest.fail("it was measured again")

    monkeypatch.setattr(calibration, "measure", measure)
    engine.renderer.calibrate(tmp_path)
    assert engine.renderer.scheduler.token_limit.maximum == budget


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"budget": 7}', "other"])
def test_a_file_that_is_damaged_or_of_something_else_is_replaced(
    engine: Engine, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: [(64, 1.0)])
    engine.renderer.calibrate(tmp_path)
    [file] = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"budget": 7, "dtype": "float8"}) if content == "other" else content)
    engine.renderer.calibrate(tmp_path)
    assert engine.renderer.scheduler.token_limit.maximum == 64
    assert json.loads(file.read_text()) == kept


@pytest.mark.parametrize("budget", ["64", 0, -1, True, 1.5, None])
def test_a_budget_that_is_no_number_of_tokens_is_measured_again(
    engine: Engine, tmp_path: Path, budget: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: [(64, 1.0)])
    engine.renderer.calibrate(tmp_path)
    [file] = tmp_path.glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"budget": budget}))
    engine.renderer.calibrate(tmp_path)
    assert engine.renderer.scheduler.token_limit.maximum == 64


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_without_a_folder_an_engine_starts_all_the_same(
    engine: Engine, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: [(64, 1.0)])
    (tmp_path / "file").touch()
    engine.renderer.calibrate(None if place == "nowhere" else tmp_path / "file" / "glimmer")
    assert engine.renderer.scheduler.token_limit.maximum == 64


def test_the_limit_of_the_engine_is_never_exceeded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: [(10**6, 1.0)])
    for _ in range(2):
        engine.renderer.calibrate(tmp_path)
        limit = engine.renderer.scheduler.token_limit.maximum
        assert limit == 2 * engine.limits.render_token_budget


def test_images_are_the_same_after_it(engine: Engine, model: GlmImage, tmp_path: Path) -> None:
    [[before]] = small_engine(model).generate([SPEC])
    engine.renderer.calibrate(tmp_path)
    [[after]] = engine.generate([SPEC])
    assert before.equal(after)
