import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.planner.sampler import sample, uniforms


def draw(
    logits: torch.Tensor, uniform: float, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None
) -> int:
    one = torch.ones(1)
    return int(sample(logits[None], one * uniform, one * temperature, one * top_p, top_k))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999999])
def test_temperature_zero_takes_the_likeliest(uniform: float) -> None:
    assert draw(torch.tensor([0.1, 3.0, 2.9, -1.0]), uniform, temperature=0.0) == 1


@pytest.mark.parametrize("top_k", [None, 2, 3])
def test_of_equals_greedy_takes_the_first(top_k: int | None) -> None:
    assert draw(torch.tensor([1.0, 2.0, 2.0, 0.0]), 0.99, temperature=0.0, top_k=top_k) == 1


def test_frequencies_are_the_softmax_s() -> None:
    logits = torch.randn(12)
    count = 20_000
    rows = logits.expand(count, -1)
    u = (torch.arange(count) + 0.5) / count
    drawn = sample(rows, u, torch.full((count,), 0.7), torch.ones(count), None)
    got = torch.bincount(drawn, minlength=12) / count
    torch.testing.assert_close(got, torch.softmax(logits / 0.7, -1), atol=2e-4, rtol=0)


def test_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    probability = torch.tensor([0.05, 0.5, 0.15, 0.3])
    reached = {draw(probability.log(), u / 1000, top_p=0.75) for u in range(1000)}
    assert reached == {1, 3}
    assert {draw(probability.log(), u / 1000, top_p=0.85) for u in range(1000)} == {1, 2, 3}
    assert {draw(probability.log(), u / 1000, top_p=0.001) for u in range(1000)} == {1}


def test_top_k_cuts_before_drawing() -> None:
    probability = torch.tensor([0.05, 0.5, 0.15, 0.3])
    assert {draw(probability.log(), u / 1000, top_k=2) for u in range(1000)} == {1, 3}


@pytest.mark.parametrize(("top_k", "top_p"), [(9, 0.8), (None, 0.8), (9, 1.0), (100, 0.3), (1, 1.0)])
def test_the_distribution_is_the_reference_s(top_k: int | None, top_p: float) -> None:
    """Compare with transformers, which applies `top_k` first and `top_p` to the rest."""
    logits, count = torch.randn(40), 20_000
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(top_p)])
    if top_k is not None:
        warpers.insert(1, TopKLogitsWarper(top_k))
    expected = torch.softmax(warpers(torch.empty(1, 0), logits[None])[0], -1)  # type: ignore[arg-type]
    u, ones = (torch.arange(count) + 0.5) / count, torch.ones(count)
    drawn = sample(logits.expand(count, -1), u, 0.7 * ones, top_p * ones, top_k)
    torch.testing.assert_close(torch.bincount(drawn, minlength=40) / count, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("top_k", [None, 50])
def test_a_row_does_not_depend_on_the_others(top_k: int | None) -> None:
    logits, u = torch.randn(16, 512), torch.rand(16)
    temperature, top_p = torch.rand(16) + 0.2, torch.rand(16) * 0.9 + 0.1
    together = sample(logits, u, temperature, top_p, top_k)
    order = torch.randperm(16)
    assert torch.equal(sample(logits[order], u[order], temperature[order], top_p[order], top_k), together[order])
    for row in range(16):
        one = slice(row, row + 1)
        assert torch.equal(sample(logits[one], u[one], temperature[one], top_p[one], top_k), together[one])


def test_a_plan_s_uniforms_follow_from_its_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = uniforms(7, 100), uniforms(7, 100), uniforms(8, 100)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(uniforms(7, 50), first[:50])
    assert uniforms(2**53 - 1 + 9, 3).shape == (3,)
