"""Plans that a planner under training writes, and what they show: a score in seconds, without images."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from models.nano.recipe import codes, world
from models.nano.recipe.facts import Facts
from models.nano.recipe.planner import TrainedPlanner
from models.nano.recipe.planner_sequences import grid_positions, preview_grid
from models.nano.recipe.world import Poster, Shape, Side


@torch.no_grad()
def sample_plans(
    model: TrainedPlanner,
    encode: Callable[[str], list[int]],
    prompts: Sequence[str],
    rows: int,
    columns: int,
    seed: int,
    temperature: float,
    top_p: float,
) -> np.ndarray:
    """Return sampled plans [n, rows, columns]."""
    preview = preview_grid(rows, columns)
    end = f"<sop>{rows} {columns}<eop><sop>{preview[0]} {preview[1]}<eop><|dit_token_start|>"
    ids = [encode(f"<|user|>\n{text}{end}") for text in prompts]
    longest, table, head = max(map(len, ids)), model.embedding(), model.head()
    tokens, mask = torch.zeros(len(ids), longest, dtype=torch.long), torch.zeros(len(ids), longest, dtype=torch.long)
    positions = torch.zeros(3, len(ids), longest, dtype=torch.long)
    grids = []
    for i, prompt in enumerate(ids):
        n = len(prompt)
        tokens[i, longest - n :], mask[i, longest - n :] = torch.tensor(prompt), 1
        positions[:, i, longest - n :] = torch.arange(n)
        grids.append(
            [grid_positions(*preview, n).reshape(3, -1), grid_positions(rows, columns, n + max(preview)).reshape(3, -1)]
        )
    cells = torch.from_numpy(np.stack([np.concatenate(grid, 1) for grid in grids], 1))  # [3, n, cells]
    generator, cache, drawn = torch.Generator().manual_seed(seed), DynamicCache(), []
    for cell in range(cells.shape[2]):
        hidden = model.text(
            inputs_embeds=F.embedding(tokens, table), position_ids=positions, attention_mask=mask,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        tokens = _sample(hidden @ head.T, temperature, top_p, generator)[:, None]
        positions, mask = cells[:, :, cell : cell + 1], torch.cat([mask, torch.ones_like(tokens)], 1)
        drawn.append(tokens)
    return torch.cat(drawn, 1)[:, preview[0] * preview[1] :].view(len(ids), rows, columns).numpy()


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    logits[:, list(codes.UNUSED)] = -torch.inf
    logits[:, codes.CODEBOOK :] = -torch.inf
    values, order = (logits / temperature).topk(50)
    shares = values.softmax(-1)
    shares = shares * (shares.cumsum(-1) - shares < top_p)
    return order.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]


def poster_of(plan: np.ndarray) -> Poster:
    """Return background and shapes of a plan [rows, columns]: of all arrangements the one with the most equal cells."""
    rows, columns = plan.shape
    background = int(Counter(plan[plan < codes.PIXEL_TEXT].tolist()).most_common(1)[0][0])
    best, found = -1, Poster(background)
    for arrangement in ARRANGEMENTS:
        placed = world.place(Poster(background, shapes=arrangement), rows, columns)[1]
        boxes = [plan[p.row : p.row + p.cells, p.column : p.column + p.cells] for p in placed]
        shapes = tuple(_shape_in(box, shape) for box, shape in zip(boxes, arrangement, strict=True))
        poster = Poster(background, shapes=tuple(shape for shape in shapes if shape))
        equal = int((world.plan(poster, rows, columns) == plan).sum())
        if len(poster.shapes) == len(arrangement) and equal > best:
            best, found = equal, poster
    return found


def _shape_in(box: np.ndarray, shape: Shape) -> Shape | None:
    kinds = Counter(codes.factors(code)[4::-3] for code in box.ravel().tolist() if codes.factors(code)[0] == 4)
    if not kinds:
        return None
    kind, colour = kinds.most_common(1)[0][0]
    return Shape(kind - 1, colour - 1, shape.large, shape.side)


SIDES: tuple[Side, ...] = ("left", "center", "right")
ARRANGEMENTS: list[tuple[Shape, ...]] = [
    (),
    *((Shape(0, 0, large, side),) for large, side in product((False, True), SIDES)),
    *((Shape(0, 0, large, "left"), Shape(0, 0, large, "right")) for large in (False, True)),
]


def check(plan: np.ndarray, facts: Facts) -> dict[str, bool]:
    """Return which properties of a plan are as the prompt says."""
    found = poster_of(plan)
    agrees = facts.agrees(found)
    full = Poster(found.background, shapes=found.shapes).with_lines(facts.poster.lines)
    expected = world.plan(full, *plan.shape)
    rows = {line.zone: slice(line.row, line.row + line.rows) for line in world.place(full, *plan.shape)[0]}
    lines = all((plan[where] == expected[where]).all() for where in rows.values())
    extra = codes.is_text(plan) & ~codes.is_text(expected)
    lines = bool(lines and not extra.any())
    return {
        "background": agrees["background"], "lines": lines, "shapes": agrees["shapes"],
        "whole": bool((plan == expected).all()) and agrees["background"] and agrees["shapes"],
    }  # fmt: skip
