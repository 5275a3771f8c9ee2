"""Training sequences of the planner: prompts and rows of their grids."""

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.nano.recipe import codes, prompts, world
from models.nano.recipe.factored import vocabulary_factors
from models.nano.recipe.loop import IGNORED
from models.nano.recipe.prompts import Edit
from models.nano.recipe.tokenizer import IMAGE_END
from models.nano.recipe.world import Line, Poster

MAX_PROMPT = 48  # tokens
EASY_PROMPT_DROP_RATE = 0.7  # of prompts that name a line's zone first
ZONE_AFTER_WORD = re.compile(r"(on top|below)\b")
EASY_EDIT_DROP_RATE = 0.7  # of edits in which nothing can be mistaken for what changes
EASY_CELL_DROP_RATE = 0.85  # of plain cells after an equal one, in such rows
ROLES = (
    "headline", "footer", "background", "headline bar", "footer bar", "left colour", "center colour", "right colour",
    "left shape", "center shape", "right shape",
)  # fmt: skip


@dataclass
class PlannerSequence:
    """A training sequence of n tokens."""

    tokens: list[int]
    positions: np.ndarray  # [3, n]
    labels: np.ndarray  # [n] next codes, or IGNORED
    roles: list[int] = field(default_factory=list)  # of prompt tokens, in ROLES, or IGNORED


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
        while True:
            poster = prompts.random_poster(rng)
            preview = preview_grid(rows, columns)
            text = prompts.describe(poster, rng)
            if not ZONE_AFTER_WORD.search(text) and rng.random() < EASY_PROMPT_DROP_RATE:
                continue
            prompt = self.encode(
                f"<|user|>\n{text}<sop>{rows} {columns}<eop><sop>{preview[0]} {preview[1]}<eop><|dit_token_start|>"
            )
            if len(prompt) <= MAX_PROMPT:
                break
        n = len(prompt)
        grids = [world.plan(poster, *preview), world.plan(poster, rows, columns)]
        positions = [grid_positions(*preview, n), grid_positions(rows, columns, n + max(preview))]
        cells = _line_cells(grids[0]) if only_lines else None
        if max_tokens is not None and cells is None:
            cells = _sample_rows(grids, rng, max_tokens - n)
        sequence = _build(prompt, np.broadcast_to(np.arange(n), (3, n)), grids, positions, rng, cells)
        sequence.roles = [self.role(token, poster) for token in prompt]
        return sequence

    def role(self, token: int, poster: Poster) -> int:
        """Return the role of a prompt token, or IGNORED unless exactly one fits."""
        factor = dict(zip(codes.FACTORS, self.factors[token], strict=True))
        lines = {"headline": poster.headline, "footer": poster.footer}
        names = []
        if factor["length"]:
            names = [
                name for name, line in lines.items()
                if line and (len(line.text), 1 + codes.initial_of(line.text)) == (factor["length"], factor["initial"])
            ]  # fmt: skip
        elif factor["colour"]:
            colour = factor["colour"] - 1
            names = ["background"] * (poster.background == colour)
            names += [f"{name} bar" for name, line in lines.items() if line and line.bar == colour]
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
    placed = world.place(Poster(0, Line("X"), Line("X")), *grid.shape)[0]
    return [(line.row, line.rows) for line in placed]


def _busy_rows(grid: np.ndarray) -> np.ndarray:
    """Return which rows have content or room for a line."""
    busy = np.asarray((grid >= codes.PIXEL_TEXT).any(1))
    for row, rows in _line_rows(grid):
        busy[row : row + rows] = True
    return busy


def _line_cells(grid: np.ndarray) -> np.ndarray:
    """Return the cells of each zone's first row and the one before, which predicts it."""
    columns = grid.shape[1]
    starts = [row * columns for row, _ in _line_rows(grid)]
    return np.sort(np.concatenate([np.arange(max(0, start - 1), start + columns) for start in starts]))


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


def collate(sequences: list[PlannerSequence], length: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens [b, t], positions [3, b, t], labels, roles [b, t], padded to `length`."""
    ids = torch.full((len(sequences), length), pad)
    positions = torch.zeros(3, len(sequences), length, dtype=torch.long)
    labels = torch.full((len(sequences), length), IGNORED)
    roles = labels.clone()
    for i, sequence in enumerate(sequences):
        n = len(sequence.tokens)
        ids[i, :n] = torch.tensor(sequence.tokens)
        positions[:, i, :n] = torch.from_numpy(sequence.positions.copy())
        labels[i, :n] = torch.from_numpy(sequence.labels)
        roles[i, : len(sequence.roles)] = torch.tensor(sequence.roles, dtype=torch.long)
    return ids, positions, labels, roles
