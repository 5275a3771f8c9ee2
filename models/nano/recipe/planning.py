"""Plans that a planner under training writes, and what they show: a score in seconds, without images."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.nano.recipe import codes, world
from models.nano.recipe.facts import Facts
from models.nano.recipe.planner import TrainedPlanner, rms, rotate
from models.nano.recipe.planner_sequences import grid_positions, preview_grid
from models.nano.recipe.world import Poster, Shape, Side


class _Cache:
    """Keys and values [layers, b, heads, tokens, dim] of left-padded sequences."""

    def __init__(self, text: Any, mask: Tensor, room: int):
        config = text.config
        b, t = mask.shape
        shape = (len(text.layers), b, config.num_key_value_heads, t + room, config.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.visible = torch.cat([mask.bool(), torch.ones(b, room, dtype=torch.bool)], 1)[:, None, None]
        self.length = 0

    def layers(self, text: Any, x: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden states [b, t, hidden] of new tokens x."""
        cos, sin = (r[:, None] for r in text.rotary_emb(x, positions))
        b, t, _ = x.shape
        start, end = self.length, self.length + t
        causal = torch.ones(t, end, dtype=torch.bool).tril(start)
        for layer, keys, values in zip(text.layers, self.keys, self.values, strict=True):
            attention = layer.self_attn
            y = rms(x, layer.input_layernorm.weight)
            q, k, v = (
                project(y).view(b, t, -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[:, :, start:end], values[:, :, start:end] = rotate(k, cos, sin), v
            seen = self.visible[..., :end] & causal
            seen[..., 0] |= ~seen.any(-1)  # of padding
            attended = F.scaled_dot_product_attention(
                rotate(q, cos, sin), keys[:, :, :end], values[:, :, :end], seen, enable_gqa=True
            )
            y = attention.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + rms(y, layer.post_self_attn_layernorm.weight)
            gate, up = layer.mlp.gate_up_proj(rms(x, layer.post_attention_layernorm.weight)).chunk(2, -1)
            x = x + rms(layer.mlp.down_proj(up * F.silu(gate)), layer.post_mlp_layernorm.weight)
        self.length = end
        return rms(x, text.norm.weight)


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
        parts = grid_positions(*preview, n), grid_positions(rows, columns, n + max(preview))
        grids.append(np.concatenate([part.reshape(3, -1) for part in parts], 1))
    cells = torch.from_numpy(np.stack(grids, 1))  # [3, n, cells]
    generator, drawn = torch.Generator().manual_seed(seed), []
    cache = _Cache(model.text, mask, cells.shape[2])
    for cell in range(cells.shape[2]):
        hidden = cache.layers(model.text, F.embedding(tokens, table), positions)[:, -1]
        tokens = _sample(hidden @ head.T, temperature, top_p, generator)[:, None]
        positions = cells[:, :, cell : cell + 1]
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
    plain = Counter(plan[plan < codes.PIXEL_TEXT].tolist()).most_common(1)
    background = int(plain[0][0]) if plain else 0
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
