"""Sampling without a sort under Triton's interpreter, against the engine's sampler (run by `test_interpreted.py`)."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.planner.sampler import sample
from models.glm_image.kernels import reference
from models.glm_image.kernels.nucleus import MAX_CODES, nucleus
from tests.kernels import INTERPRETED

KINDS = ("plain", "peaked", "tied", "signed zeros", "partly impossible")
TOLERANCE = 4e-6  # of a probability summed up in float32


@dataclass(frozen=True, repr=False)
class Row:
    logits: Tensor
    uniform: float
    temperature: float
    top_p: float
    top_k: int  # 0: all

    def __repr__(self) -> str:
        settings = f"uniform {self.uniform}, temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}"
        return f"Row(logits {self.logits[:8].tolist()}... of {len(self.logits)}, {settings})"

    def reference(self) -> int:
        """Ask the engine's sampler, for which `topk` chooses any of the codes that tie for the last place."""
        uniform, temperature, top_p = (torch.tensor([x]) for x in (self.uniform, self.temperature, self.top_p))
        score, codes = self.logits.sort(descending=True, stable=True)
        if 0 < self.top_k < len(codes) and score[self.top_k - 1] == score[self.top_k]:
            likeliest = codes[: self.top_k].sort().values
            return int(likeliest[sample(self.logits[likeliest][None], uniform, temperature, top_p, None)])
        return int(sample(self.logits[None], uniform, temperature, top_p, self.top_k or None))

    def explains(self, code: int) -> bool:
        """Return whether code is right if sums of probabilities are off by less than `TOLERANCE`, in float64."""
        codes = self.logits.sort(descending=True, stable=True).indices[: self.top_k or None]
        if self.temperature == 0:
            return code == int(codes[0])
        probability = (self.logits[codes] / torch.tensor(self.temperature)).double().softmax(0)
        after = probability.cumsum(0)
        before = after - probability
        least, most = (max(1, int((before < self.top_p + error).sum())) for error in (-TOLERANCE, TOLERANCE))
        if code not in codes[:most]:
            return False
        place = int((codes == code).nonzero())
        totals = after[max(least, place + 1) - 1 : most]  # of every cut that keeps the code
        target = self.uniform * totals
        is_last = torch.arange(max(least, place + 1) - 1, most) == place
        return bool(((before[place] - TOLERANCE <= target) & ((target <= after[place] + TOLERANCE) | is_last)).any())


def run(rows: list[Row], function=nucleus) -> list[int]:  # type: ignore[no-untyped-def]
    """Sample from rows that are part of a wider matrix, as the codes of all outputs are."""
    size = len(rows[0].logits)
    outputs = torch.full((len(rows), size + 3), torch.inf)
    outputs[:, :size] = torch.stack([row.logits for row in rows])
    numbers = [torch.tensor([getattr(row, name) for row in rows]) for name in ("uniform", "temperature", "top_p")]
    top_k = torch.tensor([row.top_k for row in rows], dtype=torch.int32)
    return function(outputs[:, :size], *numbers, top_k).tolist()


def random_logits(size: int, kind: str, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=draw)
    if kind == "peaked":
        return 12 * logits
    if kind == "tied":
        return (2 * logits).round()
    if kind == "signed zeros":
        return torch.where(logits > 1, logits, logits.sign() * 0.0)
    if kind == "partly impossible":
        return logits.masked_fill(logits < 0.3, -torch.inf).index_fill(0, torch.tensor(size // 2), 1.0)
    return logits


uniforms = st.one_of(st.sampled_from((0.0, 0.5, 1 - 2**-24)), st.integers(0, 2**24 - 1).map(lambda n: n / 2**24))


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    size = draw(st.sampled_from((1, 2, 7, 64, 300)))
    row = st.builds(
        Row,
        st.builds(random_logits, st.just(size), st.sampled_from(KINDS), st.integers(0, 2**32)),
        uniforms,
        st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0, 1.7)),
        st.sampled_from((0.01, 0.5, 0.75, 0.95, 1.0)),
        st.sampled_from((0, 1, 2, 5, 50)),
    )
    return draw(st.lists(row, min_size=1, max_size=3))


@settings(INTERPRETED, max_examples=10)
@given(batches())
def test_samples_as_the_engine(rows: list[Row]) -> None:
    """Allow another code only where both are right within float32's errors, which is at a boundary between them."""
    for row, code, by_sort in zip(rows, run(rows), run(rows, reference.nucleus), strict=True):
        assert row.explains(code)
        if code != row.reference():
            assert row.explains(row.reference())
        assert by_sort == row.reference() or row.explains(by_sort)
        assert run([row]) == [code]


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_rare(kind: str) -> None:
    """Sample from few codes of similar probability: a wrong cut or order would often show."""
    settings = [(u, t, p, k) for u, t in ((0.1, 0.5), (0.99, 2.0)) for p in (0.55, 1.0) for k in (0, 3, 11)]
    rows = [Row(random_logits(12, kind, seed), *setting) for seed, setting in enumerate(settings)]
    codes = run(rows)
    assert all(row.explains(code) for row, code in zip(rows, codes, strict=True))
    assert sum(code != row.reference() for row, code in zip(rows, codes, strict=True)) <= 1


@settings(INTERPRETED, max_examples=8)
@given(st.integers(0, 7), st.integers(0, 63), st.sampled_from((0, 16, 32)), st.integers(0, 2**32))
def test_equal_scores_go_to_the_lowest_code(power: int, numerator: int, top_k: int, seed: int) -> None:
    """Draw probabilities that are powers of 2, so that all sums are exact: the code has to be the same."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
    logits = torch.full((128,), -torch.inf).index_fill(0, order[: 2**power], 1.5)
    for top_p in (0.25, 0.5, 1.0):
        row = Row(logits, numerator / 64, 0.5, top_p, top_k)
        assert run([row]) == [row.reference()]


@settings(INTERPRETED, max_examples=10)
@given(batches())
def test_greedy_is_exact(rows: list[Row]) -> None:
    rows = [Row(row.logits, row.uniform, 0.0, row.top_p, row.top_k) for row in rows]
    assert run(rows) == [row.reference() for row in rows]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_give_some_code(value: float, temperature: float) -> None:
    """Return an index that later steps may read; the engine fails the plan."""
    for top_k in (0, 5):
        [code] = run([Row(torch.full((100,), value), 0.3, temperature, 0.75, top_k)])
        assert 0 <= code < 100


def test_too_many_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 32768 codes"):
        run([Row(torch.zeros(MAX_CODES + 1), 0.5, 1.0, 1.0, 0)])


def test_all_codes_that_fit() -> None:
    row = Row(random_logits(MAX_CODES, "plain", 0), 0.7, 0.9, 0.75, 0)
    assert row.explains(*run([row]))
