"""The grammar of free prompts: each says exactly what its poster shows, and leaves the rest to the seed."""

import ast
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.quotes import quoted_strings
from models.nano import heldout
from models.nano.heldout import by_hand, grammar
from models.nano.recipe import codes, free_prompts, layouts, phrases, planning, prompts, slips, world
from models.nano.recipe.facts import COLOUR_FACTS, Facts
from models.nano.recipe.layouts import QUOTED
from models.nano.recipe.world import Line, Poster, Shape

SEEDS = st.integers(0, 2**32)
SIZE_WORDS = {*phrases.LARGE, *phrases.SMALL}


def lettering(facts: Facts) -> list[str]:
    return sorted(line.text.upper() for line in facts.poster.lines.values())


def in_capitals(texts: list[str]) -> list[str]:
    return sorted(text.upper() for text in texts)


def words_outside_of_quotes(prompt: str) -> list[str]:
    text = QUOTED.sub(" ", prompt).lower()
    shades = "|".join(phrases.SHADES)
    text = re.sub(rf"\b({shades}) (?={'|'.join(codes.COLOURS)})", "", text)
    return re.findall(r"[a-z]+", text.replace("big letters", ""))


@given(SEEDS)
def test_quotations_are_exactly_the_lettering(seed: int) -> None:
    prompt, facts = free_prompts.random_prompt(Random(seed))
    assert in_capitals(quoted_strings(prompt, "strict")) == lettering(facts)
    if QUOTED.sub("", prompt).count("'") < 2:
        assert in_capitals(quoted_strings(prompt, "reference")) == lettering(facts)


@given(SEEDS)
def test_prompt_names_the_colours_and_shapes_that_it_says_and_no_others(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slips, "TYPO_SHARE", 0.0)
        prompt, facts = free_prompts.random_prompt(Random(seed))
    poster, words = facts.poster, words_outside_of_quotes(prompt)
    said = [poster.background] * ("background" not in facts.open)
    said += [line.bar for line in poster.lines.values() if line.bar is not None]
    said += [s.colour for s, fact in zip(poster.shapes, COLOUR_FACTS, strict=False) if fact not in facts.open]
    named = Counter(layouts.COLOUR_INDEX[word] for word in words if word in layouts.COLOUR_INDEX)
    kinds = {name: name for name in codes.SHAPES} | phrases.SHAPE_WORDS
    shapes = Counter(kinds[word] for word in words if word in kinds and word != "plus")
    twins = len({shape.kind for shape in poster.shapes}) < len(poster.shapes)
    if twins:  # "two red stars"
        assert set(named) == set(said)
    else:
        assert named == Counter(said)
    assert {name for name in shapes if name != "cross"} <= {codes.SHAPES[shape.kind] for shape in poster.shapes}
    if poster.shapes and "size" not in facts.open:
        sizes = phrases.LARGE if poster.shapes[0].large else phrases.SMALL
        assert {*words} & SIZE_WORDS <= {*sizes, "big"}
        assert {*words} & {*sizes}
    elif poster.lines:
        assert not {*words} & SIZE_WORDS


@given(SEEDS)
def test_what_is_open_varies_and_what_is_said_does_not(seed: int) -> None:
    rng = Random(seed)
    facts = layouts.random_facts(rng)
    drawn = [layouts.draw_open(facts, rng) for _ in range(200)]  # a size changes in one of six
    assert all(all(facts.agrees(other.poster).values()) for other in drawn)
    assert all({s.colour for s in d.poster.shapes}.isdisjoint({d.poster.background}) for d in drawn)
    for fact in facts.open - {"size"} if facts.poster.subtitle else facts.open:
        closed = facts.open - {fact}
        changed = [d for d in drawn if not all(Facts(facts.poster, closed).agrees(d.poster).values())]
        assert changed, fact


@pytest.mark.parametrize("is_open", [{"size"}, {"side"}, {"size", "side"}])
def test_each_cell_that_decides_a_place_has_near_even_odds(is_open: set[layouts.Fact]) -> None:
    """Sampling at temperature 0.5 drops what has odds under 0.37; the decisions come in this order."""
    facts = Facts(Poster(5, shapes=(Shape(0, 2, True, "center"),)), frozenset(is_open))
    rng = Random(1)
    drawn = Counter(
        (shape.large, shape.side) for _ in range(4000) for shape in layouts.draw_open(facts, rng).poster.shapes
    )
    rest = sum(drawn.values())
    order = [(large, side) for large, side, _ in layouts._PLACINGS if drawn[large, side]]
    assert len(order) == {1: 2, 2: 6}.get(len(is_open)) or order == [(True, s) for s in ("left", "center", "right")]
    for option in order[:-1]:
        assert 0.36 < drawn[option] / rest < 0.64
        rest -= drawn[option]


def test_typing_errors_change_one_word_and_no_quotation() -> None:
    rng = Random(3)
    for _ in range(300):
        prompt = f"a yellow poster with a triangle, title {slips.quoted('YELLOW STAR', rng)}"
        wrong = slips.with_typing_error(prompt, rng)
        assert QUOTED.findall(wrong) == QUOTED.findall(prompt)
        assert len(set(prompt.split()) - set(wrong.split())) <= 1


def test_words_without_quotation_marks_are_no_lettering() -> None:
    rng = Random(4)
    asked = [free_prompts.random_prompt(rng) for _ in range(600)]
    unquoted = [(text, facts) for text, facts in asked if not facts.poster.lines and re.search(r"say|read|titl", text)]
    assert len(unquoted) > 10
    assert all(not codes.is_text(world.plan(facts.poster, 8, 8)).any() for _, facts in unquoted)


def test_no_word_of_the_other_split() -> None:
    rng = Random(5)
    for _ in range(300):
        facts = layouts.random_facts(rng)
        assert not prompts.held_out(prompts.combination(facts.poster))
        assert not any(prompts.held_out(line.text) for line in facts.poster.lines.values())


# --- The second grammar


def test_held_out_prompts_quote_their_lettering() -> None:
    cases = [*grammar.cases(), *by_hand.cases()]
    assert len({prompt for prompt, _ in cases}) == len(cases) == 340
    for prompt, facts in cases:
        assert all(facts.agrees(facts.poster).values()), prompt
        assert in_capitals(quoted_strings(prompt, "strict")) == lettering(facts), prompt
        said = "background" not in facts.open
        assert said <= bool({*layouts.COLOUR_INDEX} & {*re.findall("[a-z]+", prompt.lower())} or "purpel" in prompt)


def test_neither_grammar_imports_the_other() -> None:
    recipe = Path(free_prompts.__file__).parent
    for folder, banned in ((Path(heldout.__file__).parent, "free_prompts phrases slips layouts"), (recipe, "heldout")):
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    names = {*re.findall(r"\w+", ast.unparse(node))}
                    assert not names & {*banned.split()}, file


# --- Prompts of the small grammar


def test_facts_of_a_small_prompt() -> None:
    def left_open(poster: Poster, prompt: str) -> set[str]:
        return set(layouts.facts_of(poster, prompt).open)

    star = Poster(8, Line("HI"), shapes=(Shape(3, 5, True),))
    assert left_open(star, 'a poster, headline "HI", a star') == {"background", "first colour", "size", "side"}
    assert left_open(star, 'a white poster, headline "WHITE", center a large blue star') == set()
    yellow = Poster(5, Line("BLUE"), shapes=(Shape(3, 2, True),))
    assert left_open(yellow, 'a blue poster, "BLUE", a star in the middle') == {"first colour", "size"}
    pair = Poster(1, shapes=(Shape(3, 5, True, "left"), Shape(4, 0, True, "right")))
    assert left_open(pair, "an orange poster with a star next to a red heart") == {"first colour", "size"}


# --- Scores of plans


@given(SEEDS)
def test_score_of_a_plan(seed: int) -> None:
    rng = Random(seed)
    facts = layouts.random_facts(rng)
    rows, columns = rng.choice(((8, 8), (8, 12), (16, 16)))
    plan = world.plan(layouts.draw_open(facts, rng).poster, rows, columns)
    assert all(planning.check(plan, facts).values())
    poster = facts.poster
    other = replace(poster, background=next(c for c in range(10) if c != poster.background))
    if "background" not in facts.open:
        assert not planning.check(world.plan(other, rows, columns), facts)["whole"]
    moved = world.plan(replace(poster, headline=poster.footer, footer=poster.headline), rows, columns)
    if (moved != world.plan(poster, rows, columns)).any():
        assert not planning.check(moved, facts)["lines"]
    if poster.shapes:
        assert not planning.check(world.plan(replace(poster, shapes=()), rows, columns), facts)["shapes"]
        assert (plan == world.plan(poster, rows, columns)).all() or facts.open
        assert np.isin(plan, codes.UNUSED).sum() == 0


def test_a_plan_of_nothing_but_shapes_is_scored() -> None:
    plan = np.full((8, 8), codes.shape(0, 0, 0))
    assert not planning.check(plan, Facts(Poster(5, Line("HI"))))["whole"]
