"""Prompts, their split into training and held-out, and their tokens."""

import re
from random import Random

import pytest

from engine.quotes import quoted_strings
from models.glm_image.prompt import PromptEncoder
from models.nano import CHECKPOINT
from models.nano.recipe import codes, prompts
from models.nano.recipe.tokenizer import OTHER, in_bytes, string_token


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.load(CHECKPOINT / "processor")


def tokens(encoder: PromptEncoder, prompt: str) -> list[str]:
    tokenizer = encoder.processor.tokenizer
    return tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)


def string(letters: int, first: str) -> str:
    return in_bytes(string_token(letters, first))


def test_no_word_and_no_combination_is_in_both_splits() -> None:
    rng = Random(1)
    splits: tuple[tuple[prompts.Split, bool], ...] = (("train", False), ("held-out", True))
    for split, out in splits:
        for _ in range(300):
            poster = prompts.random_poster(rng, split)
            assert prompts.held_out(prompts.combination(poster)) == out
            assert {prompts.held_out(line.text) for line in (poster.headline, poster.footer) if line} == {out}


def test_prompt_quotes_only_the_lines() -> None:
    rng = Random(2)
    for _ in range(300):
        poster = prompts.random_poster(rng)
        quoted = sorted(text.upper() for text in quoted_strings(prompts.describe(poster, rng)))
        assert quoted == sorted(line.text.upper() for line in (poster.headline, poster.footer) if line)


def test_edit_changes_one_thing() -> None:
    rng = Random(3)
    for _ in range(300):
        edit = prompts.random_edit(rng)
        names = ("background", "headline", "footer", "shapes")
        changed = [name for name in names if getattr(edit.before, name) != getattr(edit.after, name)]
        assert len(changed) <= 1
        assert not edit.kept_zones & set(changed)


def test_quoted_string_is_one_token_for_its_length_and_first_letter(encoder: PromptEncoder) -> None:
    assert tokens(encoder, 'top "Hello", bottom “X1”') == ["top", string(5, "h"), ",", "bottom", string(2, "x")]
    assert tokens(encoder, "'SALE!' and 「BIG SALE」") == [string(5, "s"), "and", string(8, "b")]
    assert tokens(encoder, '"A VERY LONG HEADLINE"') == [string(10, "a")]
    assert tokens(encoder, '"ÉTÉ"') == [string(3, OTHER)]


def test_apostrophes_and_single_quotes_are_no_strings(encoder: PromptEncoder) -> None:
    found = tokens(encoder, "a dog's red poster, don't \"HI\" a blue star")
    assert found.count(string(2, "h")) == 1
    assert {"red", "poster", "blue", "star"} <= set(found)
    assert tokens(encoder, 'a 5" red star')[-2:] == ["red", "star"]


def test_all_words_of_the_grammar_are_whole_tokens(encoder: PromptEncoder) -> None:
    rng = Random(4)
    for _ in range(200):
        poster = prompts.random_poster(rng)
        words = re.findall(r"[a-z]+", re.sub(r"[\"“「'].*?[\"”」']", " ", prompts.describe(poster, rng).lower()))
        assert set(words) <= set(tokens(encoder, " ".join(words)))


def test_any_text_is_a_prompt(encoder: PromptEncoder) -> None:
    for prompt in ("une affiche étrange 漫画", "⟨5⟩h", "'" * 7, '"', "#" * 50, "a" * 500):
        ids = encoder.encode(prompt, 256, 256)
        assert ids[-1] == codes.CODEBOOK  # the start of an image
