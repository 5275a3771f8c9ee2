"""Posters: drawings, plans and reading back agree."""

from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest

from models.nano.recipe import codes, layouts, prompts, reading, world
from models.nano.recipe.world import Line, Poster, Shape

SIZES = [(256, 256), (384, 256), (256, 384), (512, 512)]


def test_every_code_has_different_factors() -> None:
    made = [codes.factors(code) for code in range(codes.CODEBOOK) if code not in codes.UNUSED]
    assert len(set(made)) == len(made)
    assert all(codes.factors(code)[0] == 5 for code in codes.LONG_LINE)
    assert all(max(column) < size for column, size in zip(zip(*made, strict=True), codes.FACTORS.values(), strict=True))


def in_capitals(poster: Poster) -> Poster:
    lines: dict[world.Zone, Line] = {zone: Line(line.text.upper(), line.bar) for zone, line in poster.lines.items()}
    return poster.with_lines(lines)


@pytest.mark.parametrize("size", SIZES)
def test_reads_a_drawn_poster_back(size: tuple[int, int]) -> None:
    rng = Random(f"{size}")
    for _ in range(40):
        poster = prompts.random_poster(rng)
        assert reading.read(world.draw(poster, *size)) == in_capitals(poster)


@pytest.mark.parametrize("size", SIZES)
def test_reads_narrow_letters_subtitles_and_lines_in_the_middle(size: tuple[int, int]) -> None:
    rng = Random(f"free {size}")
    for _ in range(25):
        poster = layouts.random_poster(rng)
        drawn: dict[world.Zone, Line] = {}
        for zone, line in poster.lines.items():
            drawn[zone] = replace(line, text=line.text[: world.MAX_LETTERS].rstrip())
        poster = in_capitals(poster.with_lines(drawn))
        assert reading.read(world.draw(poster, *size)) == poster


def test_long_lines_have_narrow_letters_and_are_cut_after_the_fourteenth() -> None:
    def plan(text: str) -> np.ndarray:
        return world.plan(Poster(8, Line(text, 4)), 8, 8)[1]

    first, half = codes.half_of("A"), codes.half_of("Z")
    assert plan("ABOUT TWELVE").tolist() == [4, *(codes.long_line(k, first, 4) for k in range(6)), 4]
    fourteen = [codes.long_line(codes.LONG_HALF_CELL_SLOT + k, half, 4) for k in range(8)]
    assert plan("ZEBRA CROSSING").tolist() == fourteen
    assert plan("ZEBRA CROSSINGS").tolist() == fourteen
    assert (world.draw(Poster(8, Line("ZEBRA CROSSINGS")), 256, 256)[32:64, 240:] == world.PALETTE[8]).all()


def test_no_shape_has_a_code_of_long_lines() -> None:
    for kind, large in product(range(len(codes.SHAPES)), (True, False)):
        for colour in range(len(codes.COLOURS) - 1):
            plan = world.plan(Poster(9, shapes=(Shape(kind, colour, large),)), 8, 8)
            assert not codes.is_text(plan).any()


def test_reads_errors_in_an_image() -> None:
    poster = Poster(5, Line("HELLO", 0), Line("BYE"), (Shape(3, 2, large=True),))
    image = world.draw(poster, 256, 256)
    smeared = image.copy()
    smeared[32:64, 32:128] = world.PALETTE[0]  # the first letters are gone
    assert (reading.read(smeared).headline or Line("")).text != "HELLO"
    recoloured = image.copy()
    recoloured[64:192] = world.draw(replace(poster, shapes=(Shape(3, 6, large=True),)), 256, 256)[64:192]
    assert reading.read(recoloured).shapes == (Shape(3, 6, large=True),)


def test_plan_has_the_layout_of_its_image() -> None:
    poster = Poster(8, Line("AB"), Line("SALE", 4), (Shape(0, 1, large=False, side="left"),))
    plan = world.plan(poster, 8, 8)
    first = codes.initial_of("AB")
    assert plan[1].tolist() == [8, 8, 8, codes.line(0, first, 8), codes.line(1, first, 8), 8, 8, 8]
    sale = codes.initial_of("SALE")
    middle = [codes.line(codes.HALF_CELL_SLOT + k, sale, 4) for k in range(4)]
    assert plan[6].tolist() == [4, 4, *middle, 4, 4]
    assert plan[3:5, 1:3].ravel().tolist() == [codes.shape(0, 1, codes.SMALL_PIECE + k) for k in range(4)]
    assert (world.plan(poster, 8, 8, from_pixels=world.ZONES)[1, 3:5] == codes.pixel_text(8)).all()
    assert (world.plan(poster, 8, 8, from_pixels={"footer"})[1] == plan[1]).all()


def test_plan_of_a_large_poster_is_the_small_one_enlarged() -> None:
    rng = Random(2)
    for _ in range(20):
        poster = prompts.random_poster(rng)
        assert (world.plan(poster, 16, 16) == np.kron(world.plan(poster, 8, 8), np.ones((2, 2), np.int64))).all()


@pytest.mark.parametrize(
    "grid", [(8, 8), (8, 12), (12, 8), (16, 16), (13, 19), (19, 13), (4, 4), (32, 32), (2, 8), (8, 2)]
)
def test_any_grid_can_be_laid_out(grid: tuple[int, int]) -> None:
    rng = Random(3)
    for index in range(60):
        poster = prompts.random_poster(rng) if index < 30 else layouts.random_poster(rng)
        plan = world.plan(poster, *grid)
        assert plan.shape == grid
        assert plan.min() >= 0
        assert plan.max() < codes.CODEBOOK
        assert not np.isin(plan, codes.UNUSED).any()
        assert world.draw(poster, grid[1] * 32, grid[0] * 32).shape == (grid[0] * 32, grid[1] * 32, 3)
