"""Training sequences of the planner: prompts and rows of their grids."""

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.nano.recipe import codes, free_prompts, layouts, prompts, world
from models.nano.recipe.factored import vocabulary_factors
from models.nano.recipe.facts import COLOUR_FACTS, Facts
from models.nano.recipe.loop import IGNORED
from models.nano.recipe.prompts import Edit
from models.nano.recipe.tokenizer import IMAGE_END
from models.nano.recipe.world import ZONES, Line, Poster

MAX_PROMPT = 64  # tokens; 1 in 200 of the free prompts is longer
FREE_SHARE = 0.75  # of the prompts; the others are of the small grammar
EASY_PROMPT_DROP_RATE = 0.7  # of prompts that name a line's zone first
ZONE_AFTER_WORD = re.compile(r"(on top|below)\b")
EASY_EDIT_DROP_RATE = 0.7  # of edits in which nothing can be mistaken for what changes
EASY_CELL_DROP_RATE = 0.85  # of plain cells after an equal one, in such rows
ROLES = (
    *ZONES, "background", *(f"{zone} bar" for zone in ZONES), "left colour", "center colour", "right colour",
    "left shape", "center shape", "right shape",
)  # fmt: skip
# Targets of a middle layer: the role of a prompt's token, and what the prompt says at the tokens that follow it, one
# for each zone, side and the background. 0 is "none".
FACT_HINTS = {
    "length": codes.FACTORS["length"], "initial": codes.FACTORS["initial"], "bar": codes.FACTORS["colour"],
    "kind": codes.FACTORS["shape"], "colour": codes.FACTORS["colour"], "large": 3,
    "background": codes.FACTORS["colour"],
}  # fmt: skip
PROMPT_HINTS = {"role": len(ROLES)} | FACT_HINTS
SIDES = ("left", "center", "right")


@dataclass
class PlannerSequence:
    """A training sequence of n tokens."""

    tokens: list[int]
    positions: np.ndarray  # [3, n]
    labels: np.ndarray  # [n] next codes, or IGNORED
    hints: dict[str, list[int]] = field(default_factory=dict)  # of prompt tokens, see PROMPT_HINTS


def preview_grid(rows: int, columns: int) -> tuple[int, int]:
    return int((rows / columns) ** 0.5 * 16), int((columns / rows) ** 0.5 * 16)


def grid_positions(rows: int, columns: int, start: int) -> np.ndarray:
    """Return positions [3, rows, columns]: time, height, width."""
    grid = np.full((3, rows, columns), start)
    grid[1] += np.arange(rows)[:, None]
    grid[2] += np.arange(columns)
    return grid


class SequenceSampler:
    """Draws random sequences."""

    def __init__(self, tokenizer: Any):
        self.encode = lambda text: tokenizer.backend_tokenizer.encode(text).ids
        self.factors = vocabulary_factors(tokenizer, len(tokenizer)).tolist()

    def generation(
        self, rng: Random, rows: int, columns: int, max_tokens: int | None, only_lines: bool = False
    ) -> PlannerSequence:
        """Return a prompt with as many rows of its preview and plan as fit into `max_tokens`; with `only_lines`, the
        preview's rows in which a line can begin.
        """
        preview = preview_grid(rows, columns)
        tail = self.encode(f"<sop>{rows} {columns}<eop><sop>{preview[0]} {preview[1]}<eop><|dit_token_start|>")
        while True:
            text, facts = _random_prompt(rng)
            head = self.encode(f"<|user|>\n{text}")
            if len(head) + len(tail) <= MAX_PROMPT:
                break
        poster, prompt = facts.poster, head + tail
        n = len(prompt)
        grids = [world.plan(poster, *preview), world.plan(poster, rows, columns)]
        positions = [grid_positions(*preview, n), grid_positions(rows, columns, n + max(preview))]
        cells = _line_cells(grids[0]) if only_lines else None
        if max_tokens is not None and cells is None:
            cells = _sample_rows(grids, rng, max_tokens - n)
        sequence = _build(prompt, np.broadcast_to(np.arange(n), (3, n)), grids, positions, rng, cells)
        sequence.hints = _fact_hints(facts, len(head), len(tail))
        sequence.hints["role"] = [self.role(token, poster) for token in prompt]
        return sequence

    def role(self, token: int, poster: Poster) -> int:
        """Return the role of a prompt token, or IGNORED unless exactly one fits."""
        factor = dict(zip(codes.FACTORS, self.factors[token], strict=True))
        lines = poster.lines
        names = []
        if factor["length"]:
            names = [
                name for name, line in lines.items() if string_factors(line) == (factor["length"], factor["initial"])
            ]
        elif factor["colour"]:
            colour = factor["colour"] - 1
            names = ["background"] * (poster.background == colour)
            names += [f"{name} bar" for name, line in lines.items() if line.bar == colour]
            names += [f"{shape.side} colour" for shape in poster.shapes if shape.colour == colour]
        elif factor["shape"]:
            names = [f"{shape.side} shape" for shape in poster.shapes if shape.kind == factor["shape"] - 1]
        return ROLES.index(names[0]) if len(names) == 1 else IGNORED

    def edit(self, rng: Random, rows: int, columns: int, max_tokens: int | None) -> PlannerSequence:
        """Return a source's codes and an instruction, then rows of the edited plan."""
        edit = prompts.random_edit(rng)
        while not _is_ambiguous(edit) and rng.random() < EASY_EDIT_DROP_RATE:
            edit = prompts.random_edit(rng)
        source = world.plan(edit.before, rows, columns, from_pixels=world.ZONES).ravel().tolist()
        head = self.encode("<|user|>\n<|dit_token_start|>")
        tail = self.encode(f"<|dit_token_end|>{edit.instruction}<sop>{rows} {columns}<eop><|dit_token_start|>")
        start = len(head)
        after = start + max(rows, columns)
        prompt_positions = np.concatenate([
            np.broadcast_to(np.arange(start), (3, start)), grid_positions(rows, columns, start).reshape(3, -1),
            np.broadcast_to(np.arange(after, after + len(tail)), (3, len(tail))),
        ], 1)  # fmt: skip
        prompt = head + source + tail
        positions = grid_positions(rows, columns, after + len(tail))
        plan = world.plan(edit.after, rows, columns, from_pixels=edit.kept_zones)
        cells = None if max_tokens is None else _sample_rows([plan], rng, max_tokens - len(prompt))
        return _build(prompt, prompt_positions, [plan], [positions], rng, cells)


def _random_prompt(rng: Random) -> tuple[str, Facts]:
    """Return a prompt and its facts, the open ones drawn anew."""
    if rng.random() < FREE_SHARE:
        return free_prompts.random_prompt(rng)
    while True:
        poster = prompts.random_poster(rng)
        text = prompts.describe(poster, rng)
        facts = layouts.draw_open(layouts.facts_of(poster, text), rng)
        is_easy = not ZONE_AFTER_WORD.search(text) and rng.random() < EASY_PROMPT_DROP_RATE
        if not is_easy and not prompts.held_out(prompts.combination(facts.poster)):
            return text, facts


def string_factors(line: Line) -> tuple[int, int]:
    """Return the factors "length" and "initial" of a line's string."""
    length = len(line.text)
    if length <= world.WIDE_LETTERS:
        return length, 1 + codes.initial_of(line.text)
    return min(length, world.MAX_LETTERS), 1 + codes.INITIALS + codes.half_of(line.text)


def _fact_hints(facts: Facts, head: int, tail: int) -> dict[str, list[int]]:
    """Return what a prompt says, as targets of the first eight tokens after it."""
    hints = {name: [IGNORED] * (head + tail) for name in FACT_HINTS}

    def put(place: int, **values: int) -> None:
        for name, value in values.items():
            hints[name][head + place] = value

    poster = facts.poster
    for place, zone in enumerate(ZONES):
        line = poster.lines.get(zone)
        length, initial = string_factors(line) if line else (0, 0)
        put(place, length=length, initial=initial, bar=0 if line is None or line.bar is None else 1 + line.bar)
    if "side" not in facts.open:
        for place, side in enumerate(SIDES, len(ZONES)):
            put(place, kind=0, colour=0, large=0)
            for shape, fact in zip(poster.shapes, COLOUR_FACTS, strict=False):
                if shape.side == side:
                    colour = IGNORED if fact in facts.open else 1 + shape.colour
                    large = IGNORED if "size" in facts.open else 1 + shape.large
                    put(place, kind=1 + shape.kind, colour=colour, large=large)
    if "background" not in facts.open:
        put(len(ZONES) + len(SIDES), background=1 + poster.background)
    return hints


def _is_ambiguous(edit: Edit) -> bool:
    """Return whether another shape or bar could be meant."""
    before, after = edit.before, edit.after
    bars = [line for line in (before.headline, before.footer) if line and line.bar is not None]
    return bool(bars and before.background != after.background) or (
        len(before.shapes) > 1 and before.shapes != after.shapes
    )


def _build(
    prompt: list[int],
    prompt_positions: np.ndarray,
    grids: list[np.ndarray],
    positions: list[np.ndarray],
    rng: Random,
    cells: np.ndarray | None,
) -> PlannerSequence:
    """Join the prompt and `cells` of all its grids, None: all."""
    grid_codes = np.concatenate([grid.ravel() for grid in grids] + [np.array([IMAGE_END])])
    cell_positions = np.concatenate([p.reshape(3, -1) for p in positions], 1)
    cells = np.arange(len(grid_codes) - 1) if cells is None else cells
    labels = np.concatenate([np.full(len(prompt) - 1, IGNORED), grid_codes[:1], grid_codes[cells + 1]])
    busy = np.concatenate([*(np.repeat(_busy_rows(g), g.shape[1]) for g in grids), np.array([False])])
    busy = np.concatenate([busy[:1], busy[cells + 1]])
    current = np.concatenate([[-1], grid_codes[cells]])
    target = labels[len(prompt) - 1 :]
    easy = (target == current) & (target < codes.PIXEL_TEXT) & ~busy
    draws = np.random.RandomState(rng.randrange(1 << 31)).rand(len(target))
    labels[len(prompt) - 1 :] = np.where(easy & (draws < EASY_CELL_DROP_RATE), IGNORED, target)
    all_positions = np.concatenate([prompt_positions, cell_positions[:, cells]], 1)
    return PlannerSequence(prompt + grid_codes[cells].tolist(), all_positions, labels)


def _line_rows(grid: np.ndarray) -> list[tuple[int, int]]:
    """Return (first row, number of rows) of each zone."""
    poster = Poster(0).with_lines({zone: Line("X") for zone in ZONES})
    placed = world.place(poster, *grid.shape)[0]
    return [(line.row, line.rows) for line in placed]


def _busy_rows(grid: np.ndarray) -> np.ndarray:
    """Return which rows have content or room for a line."""
    busy = np.asarray((grid >= codes.PIXEL_TEXT).any(1))
    for row, rows in _line_rows(grid):
        busy[row : row + rows] = True
    return busy


def _line_cells(grid: np.ndarray) -> np.ndarray:
    """Return the cells of each zone's first row and the one before, which predicts it. Shapes begin there, too."""
    columns = grid.shape[1]
    starts = [row * columns for row, _ in _line_rows(grid)]
    return np.unique(np.concatenate([np.arange(max(0, start - 1), start + columns) for start in starts]))


def _sample_rows(grids: list[np.ndarray], rng: Random, max_cells: int) -> np.ndarray:
    """Return the cells of random rows, preferably with content."""
    candidates, offset = [], 0
    for grid in grids:
        rows, columns = grid.shape
        for r in range(rows):
            busy = (grid[r] != grid[r, 0]).any() or grid[r, 0] != grid[0, 0]
            candidates.append((rng.random() ** (1 / (3.0 if busy else 1.0)), offset + r * columns, columns))
        offset += grid.size
    taken = []
    for _, start, columns in sorted(candidates, reverse=True):
        if columns <= max_cells:
            taken.append(np.arange(start, start + columns))
            max_cells -= columns
    return np.sort(np.concatenate(taken))


def collate(
    sequences: list[PlannerSequence], length: int, pad: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return tokens [b, t], positions [3, b, t], labels [b, t] and hints [b, t] each, padded to `length`."""
    ids = torch.full((len(sequences), length), pad)
    positions = torch.zeros(3, len(sequences), length, dtype=torch.long)
    labels = torch.full((len(sequences), length), IGNORED)
    hints = {name: labels.clone() for name in PROMPT_HINTS}
    for i, sequence in enumerate(sequences):
        n = len(sequence.tokens)
        ids[i, :n] = torch.tensor(sequence.tokens)
        positions[:, i, :n] = torch.from_numpy(sequence.positions.copy())
        labels[i, :n] = torch.from_numpy(sequence.labels)
        for name, values in sequence.hints.items():
            hints[name][i, : len(values)] = torch.tensor(values)
    return ids, positions, labels, hints
