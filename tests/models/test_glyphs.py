"""Glyph embeddings: the reference's numbers, at a bounded cost."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ByT5Tokenizer

from engine import quotes
from engine.errors import RequestError
from engine.quotes import check_quoted_strings
from models.glm_image import glyphs
from models.glm_image.glyphs import BATCH_TOKENS, MAX_GLYPH_TOKENS, MAX_GLYPH_TOKENS_PER_STRING, batches
from models.glm_image.model import GlmImage

TOKENIZER = ByT5Tokenizer()
LARGEST_HONEST = [MAX_GLYPH_TOKENS_PER_STRING] * (MAX_GLYPH_TOKENS // MAX_GLYPH_TOKENS_PER_STRING)
# Multiply-adds of the published encoder: 12 layers, width 1472, 6 heads of 64, inner width 3584.
PER_TOKEN = 12 * (4 * 1472 * 384 + 3 * 1472 * 3584)
PER_PAIR = 12 * 2 * 384
ALL_LENGTHS = st.lists(st.integers(1, MAX_GLYPH_TOKENS_PER_STRING), min_size=1, max_size=quotes.MAX_STRINGS)
MIXES = st.one_of(
    ALL_LENGTHS,
    st.lists(st.sampled_from([1, 2, 3, 100, 1024, 2048]), min_size=1, max_size=200),
    st.tuples(st.integers(1, 2048), st.integers(0, 1000), st.integers(1, 8)).map(lambda m: [m[0], *[m[2]] * m[1]]),
)


def multiply_adds(lengths: list[int]) -> int:
    cost = 0
    for batch in batches(lengths):
        longest = max(lengths[index] for index in batch)
        cost += len(batch) * longest * (PER_TOKEN + longest * PER_PAIR)
    return cost


@settings(max_examples=300, deadline=None)
@given(mix=MIXES)
def test_no_mix_of_strings_costs_much_more_than_the_largest_honest_one(mix: list[int]) -> None:
    lengths = [length for end, length in zip(_running_sums(mix), mix, strict=True) if end <= MAX_GLYPH_TOKENS]
    lengths = lengths or mix[:1]
    divided = batches(lengths)
    assert sorted(index for batch in divided for index in batch) == list(range(len(lengths)))
    for batch in divided:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= max(BATCH_TOKENS, max(lengths))
        assert len(divided) == 1 or padded < 2 * sum(lengths[index] for index in batch)
    assert multiply_adds(lengths) < 2.2 * multiply_adds(LARGEST_HONEST)


def _running_sums(mix: list[int]) -> list[int]:
    sums, total = [], 0
    for length in mix:
        total += length
        sums.append(total)
    return sums


def test_the_encoder_computes_no_more_than_the_batches_say(model: GlmImage) -> None:
    def flops(strings: list[str]) -> int:
        with FlopCounterMode(display=False) as counter:
            model.glyphs.encode(strings)
        return counter.get_total_flops()

    largest = flops([letter * 2040 for letter in "abcd"])
    for strings in (["x" * 2047, *"abcdefghij" * 4], ["x" * 2047, *[f"{i}" for i in range(500)]], ["same"] * 1000):
        assert flops(strings) < largest


def padded_at_once(model: GlmImage, strings: list[str]) -> Tensor:
    """Encode as the reference does: all strings padded to the longest."""
    ids = TOKENIZER(strings, max_length=MAX_GLYPH_TOKENS_PER_STRING, truncation=True).input_ids
    ids = [[0] * ((len(ids) + 1) % 2) + i for i in ids]
    longest = max(map(len, ids))
    tokens = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    with torch.inference_mode():
        return model.glyphs.encoder(tokens, attention_mask=mask).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("strings", [[""], ["HELLO", "bye"], ["a", "bb", "\u6587", " two words "], ["x" * 3000]])
def test_strings_that_fit_one_batch_have_the_reference_s_bits(model: GlmImage, strings: list[str]) -> None:
    assert torch.equal(model.glyphs.encode(strings), padded_at_once(model, strings))


def test_strings_of_several_batches_and_repeated_ones_have_the_reference_s_numbers(model: GlmImage) -> None:
    strings = ["x" * 1500, "a", "bb" * 400, "a", "y" * 900, "bb" * 400, "zz"]
    torch.testing.assert_close(model.glyphs.encode(strings), padded_at_once(model, strings), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=60).filter(lambda t: "<" not in t))
def test_tokens_are_the_tokenizer_s(model: GlmImage, text: str) -> None:
    assert [list(ids) for ids in model.glyphs._ids([text])] == TOKENIZER([text]).input_ids


@pytest.mark.parametrize("text", ["</s>", "<pad>", "<extra_id_0>", "a <unk> b"])
def test_names_of_control_tokens_are_spelled(model: GlmImage, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [list(ids) for ids in model.glyphs._ids([text])] != TOKENIZER([text]).input_ids
    assert model.glyphs._ids([text]) == [(*(byte + 3 for byte in text.encode()), 1)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("''" * 1025, "1025 quoted strings; at most 1024"),
        (f"'{'x' * 2000}'" * 5, "10005 bytes, .*; at most 8192"),
        (f"'{chr(0x6587) * 4000}'", None),  # cut after 2047 bytes
        ("'abcdefg'" * 1000, "9000 bytes"),  # with the end and the pad of each
        ("'abcde'" * 1001, None),
    ],
)
def test_too_many_quoted_strings_are_refused(prompt: str, message: str | None) -> None:
    if message is None:
        return check_quoted_strings("negative_prompt", prompt)
    with pytest.raises(RequestError, match=message) as caught:
        check_quoted_strings("negative_prompt", prompt)
    assert caught.value.param == "negative_prompt"
    return None


@given(strings=st.lists(st.text("ab\u6587", max_size=9), max_size=40))
def test_limits_are_counted_as_the_encoder_does(model: GlmImage, strings: list[str]) -> None:
    assert quotes.glyph_tokens(strings) == sum(map(len, model.glyphs._ids(strings))) - (not strings)
    assert quotes.MAX_STRING_TOKENS == glyphs.MAX_GLYPH_TOKENS_PER_STRING
    assert quotes.MAX_TOKENS == glyphs.MAX_GLYPH_TOKENS
