"""The planner: from a prompt's tokens to the preview's codes and the plan's.

Sequences are as the model sees them, with rows of the grids left out: positions are explicit, and most rows of a poster
repeat the one above. A second phase keeps little but the preview's lines, where the prompt's words have to be told
apart; the last one trains on whole sequences and edits, and still on lines. The forward pass is the published one,
written without what training does not need, so that it compiles well.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from models.nano.recipe import codes, prompts, world
from models.nano.recipe.factored import FactoredTable, of_codes, of_vocabulary
from models.nano.recipe.loop import Losses, autocast, device, train
from models.nano.recipe.prompts import Edit
from models.nano.recipe.tokenizer import IMAGE_END, IMAGE_START, VISION_VOCABULARY
from models.nano.recipe.world import Line, Poster

HIDDEN = 192
GRIDS = ((8, 8), (8, 12), (12, 8), (16, 16))
MAX_PROMPT = 48
IGNORED = -100
# Beside the codes, training asks a layer in the middle for what they rest on: what a word of the prompt is about, and
# in which row and column a cell is. It would be found out anyway, much later.
HINTED_LAYER = 2
HINT_WEIGHT = 0.3
EASY_PROMPTS_LEFT_OUT = 0.7  # share of the prompts that name every line's zone before its word
ZONE_AFTER_WORD = re.compile(r"(on top|below)\b")
EASY_EDITS_LEFT_OUT = 0.7  # share of the edits that leave nothing to be mistaken for what is to change
ROLES = (
    "headline", "footer", "background", "headline bar", "footer bar", "left colour", "center colour", "right colour",
    "left shape", "center shape", "right shape",
)  # fmt: skip
HINTS = {"role": len(ROLES), "row": 32, "column": 32}


def make_config(tokenizer: Any) -> GlmImageConfig:
    rope = {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 4.0, "partial_rotary_factor": 0.5}
    text = {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64, "vision_vocab_size": VISION_VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 8192, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": IMAGE_END, "rope_parameters": rope,
    }  # fmt: skip
    vision = {"depth": 3, "hidden_size": 128, "num_heads": 4, "image_size": 256, "patch_size": 16}
    return GlmImageConfig(
        text_config=text,
        vision_config=vision | {"intermediate_size": 320},
        vq_config={"embed_dim": 32, "num_embeddings": codes.CODEBOOK, "latent_channels": 128},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
    )


class TrainedPlanner(nn.Module):
    """The published module's parameters, with factored tables in the place of its two plain ones."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        torch.manual_seed(0)
        config = make_config(tokenizer)
        self.text: Any = GlmImageForConditionalGeneration(config).model.language_model
        for layer in self.text.layers:
            layer.post_self_attn_layernorm.weight.data.fill_(0.4)
            layer.post_mlp_layernorm.weight.data.fill_(0.4)
        vocabulary = self.text.config.vocab_size
        self.text.embed_tokens = nn.Identity()
        self.embedding = FactoredTable(of_vocabulary(tokenizer, vocabulary), HIDDEN, 0.6, 0.6)
        self.head = FactoredTable(of_codes(VISION_VOCABULARY), HIDDEN, 0.04, 0.0)
        for part, source in zip(self.head.parts, self.embedding.parts, strict=True):
            part.data.copy_(source.data * 0.06)
        self.hints = nn.ModuleDict({name: nn.Linear(HIDDEN, n) for name, n in HINTS.items()})
        self.layers = torch.compile(_layers, dynamic=False)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[b, t, hidden] of [b, t] tokens at [3, b, t] positions, after the last layer and after `HINTED_LAYER`."""
        hidden = F.embedding(ids, self.embedding())
        cos, sin = self.text.rotary_emb(hidden, positions)
        return self.layers(self.text, hidden, cos, sin)


def _layers(text: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.bfloat16)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    b, t, _ = x.shape
    hinted = x
    for index, layer in enumerate(text.layers):
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        y = _rms(x, layer.input_layernorm.weight)
        q, k, v = (
            project(y).view(b, t, -1, dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = attention.num_key_value_groups
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + _rms(attention.o_proj(y), layer.post_self_attn_layernorm.weight)
        gate, up = layer.mlp.gate_up_proj(_rms(x, layer.post_attention_layernorm.weight)).chunk(2, -1)
        x = x + _rms(layer.mlp.down_proj(up * F.silu(gate)), layer.post_mlp_layernorm.weight)
        if index == HINTED_LAYER:
            hinted = x
    return _rms(x, text.norm.weight), hinted


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, passed], -1)


@dataclass
class Sequence:
    """One training sequence: tokens, their positions [3, n], and what each is to predict."""

    tokens: list[int]
    positions: np.ndarray
    labels: np.ndarray
    roles: list[int] = field(default_factory=list)  # of the prompt's tokens, see ROLES


def preview_grid(rows: int, columns: int) -> tuple[int, int]:
    return int((rows / columns) ** 0.5 * 16), int((columns / rows) ** 0.5 * 16)


def grid_positions(rows: int, columns: int, start: int) -> np.ndarray:
    """[3, rows, columns]: time, height, width, from `start` on."""
    grid = np.full((3, rows, columns), start)
    grid[1] += np.arange(rows)[:, None]
    grid[2] += np.arange(columns)
    return grid


class Sequences:
    """Draws training sequences."""

    def __init__(self, tokenizer: Any):
        self.encode = lambda text: tokenizer.backend_tokenizer.encode(text).ids
        self.factors = of_vocabulary(tokenizer, len(tokenizer)).tolist()

    def generation(
        self, rng: Random, rows: int, columns: int, budget: int | None, only_lines: bool = False
    ) -> Sequence:
        """A prompt with its preview and plan; of the grids, as many rows as `budget` tokens allow.

        With `only_lines` there is nothing but the preview's rows in which a line can begin.
        """
        while True:
            poster = prompts.random_poster(rng)
            preview = preview_grid(rows, columns)
            text = prompts.describe(poster, rng)
            if not ZONE_AFTER_WORD.search(text) and rng.random() < EASY_PROMPTS_LEFT_OUT:
                continue
            prompt = self.encode(
                f"<|user|>\n{text}<sop>{rows} {columns}<eop><sop>{preview[0]} {preview[1]}<eop><|dit_token_start|>"
            )
            if len(prompt) <= MAX_PROMPT:
                break
        n = len(prompt)
        grids = [world.plan(poster, *preview), world.plan(poster, rows, columns)]
        places = [grid_positions(*preview, n), grid_positions(rows, columns, n + max(preview))]
        text = np.broadcast_to(np.arange(n), (3, n))
        kept = _line_cells(grids[0]) if only_lines else None
        if budget is not None and kept is None:
            kept = _rows(grids, rng, budget - n)
        made = _assemble(prompt, text, grids, places, rng, kept)
        made.roles = [self.role(token, poster) for token in prompt]
        return made

    def role(self, token: int, poster: Poster) -> int:
        """What a word is about, where only one thing on the poster fits it."""
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

    def edit(self, rng: Random, rows: int, columns: int, budget: int | None) -> Sequence:
        """A picture's codes, an instruction, and the plan of the picture changed."""
        made = prompts.random_edit(rng)
        while not _has_likes(made) and rng.random() < EASY_EDITS_LEFT_OUT:
            made = prompts.random_edit(rng)
        source = world.plan(made.before, rows, columns, seen=True).ravel().tolist()
        head = self.encode("<|user|>\n<|dit_token_start|>")
        tail = self.encode(f"<|dit_token_end|>{made.instruction}<sop>{rows} {columns}<eop><|dit_token_start|>")
        start = len(head)
        after = start + max(rows, columns)
        positions = np.concatenate([
            np.broadcast_to(np.arange(start), (3, start)), grid_positions(rows, columns, start).reshape(3, -1),
            np.broadcast_to(np.arange(after, after + len(tail)), (3, len(tail))),
        ], 1)  # fmt: skip
        tokens = head + source + tail
        place = grid_positions(rows, columns, after + len(tail))
        plan = world.plan(made.after, rows, columns, seen=made.kept)
        kept = None if budget is None else _rows([plan], rng, budget - len(tokens))
        return _assemble(tokens, positions, [plan], [place], rng, kept)


def _has_likes(edit: Edit) -> bool:
    """Whether there is something like what is to change, which is to stay: a bar, or another shape."""
    before, after = edit.before, edit.after
    bars = [line for line in (before.headline, before.footer) if line and line.bar is not None]
    return bool(bars and before.background != after.background) or (
        len(before.shapes) > 1 and before.shapes != after.shapes
    )


def _assemble(
    prompt: list[int],
    text: np.ndarray,
    grids: list[np.ndarray],
    places: list[np.ndarray],
    rng: Random,
    kept: np.ndarray | None,
) -> Sequence:
    """The prompt with the cells `kept` of its grids, in raster order; None keeps all."""
    codes_of = np.concatenate([g.ravel() for g in grids] + [np.array([IMAGE_END])])
    place = np.concatenate([p.reshape(3, -1) for p in places], 1)
    kept = np.arange(len(codes_of) - 1) if kept is None else kept
    following = codes_of[kept + 1]
    labels = np.concatenate([np.full(len(prompt) - 1, IGNORED), codes_of[:1], following])
    # A plain cell after one like it teaches nothing new where nothing could be, most of the time.
    busy = np.concatenate([*(np.repeat(_may_hold_something(g), g.shape[1]) for g in grids), np.array([False])])
    busy = np.concatenate([busy[:1], busy[kept + 1]])
    current = np.concatenate([[-1], codes_of[kept]])
    target = labels[len(prompt) - 1 :]
    easy = (target == current) & (target < codes.SEEN) & ~busy
    draws = np.random.RandomState(rng.randrange(1 << 31)).rand(len(target))
    labels[len(prompt) - 1 :] = np.where(easy & (draws < 0.85), IGNORED, target)
    return Sequence(prompt + codes_of[kept].tolist(), np.concatenate([text, place[:, kept]], 1), labels)


def _may_hold_something(grid: np.ndarray) -> np.ndarray:
    """[rows] whether there is more than plain cells, or a line could have been."""
    found = np.asarray((grid >= codes.SEEN).any(1))
    for placed in world.place(Poster(0, Line("X"), Line("X")), *grid.shape)[0]:
        found[placed.row : placed.row + placed.rows] = True
    return found


def _line_cells(grid: np.ndarray) -> np.ndarray:
    """Indices of the first row of each place for a line, with the cell before, which foretells the row's first."""
    columns = grid.shape[1]
    starts = [placed.row * columns for placed in world.place(Poster(0, Line("X"), Line("X")), *grid.shape)[0]]
    return np.sort(np.concatenate([np.arange(max(0, start - 1), start + columns) for start in starts]))


def _rows(grids: list[np.ndarray], rng: Random, budget: int) -> np.ndarray:
    """Indices of the cells of some rows, in raster order, at most `budget`: rather rows with something in them."""
    candidates, offset = [], 0
    for grid in grids:
        rows, columns = grid.shape
        for r in range(rows):
            busy = (grid[r] != grid[r, 0]).any() or grid[r, 0] != grid[0, 0]
            candidates.append((rng.random() ** (1 / (3.0 if busy else 1.0)), offset + r * columns, columns))
        offset += grid.size
    taken = []
    for _, start, columns in sorted(candidates, reverse=True):
        if columns <= budget:
            taken.append(np.arange(start, start + columns))
            budget -= columns
    return np.sort(np.concatenate(taken))


def collate(sequences: list[Sequence], length: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[b, t] tokens, [3, b, t] positions, [b, t] labels, [b, t] roles, padded on the right."""
    ids = torch.full((len(sequences), length), pad)
    positions = torch.zeros(3, len(sequences), length, dtype=torch.long)
    labels = torch.full((len(sequences), length), IGNORED)
    roles = labels.clone()
    for i, s in enumerate(sequences):
        n = len(s.tokens)
        ids[i, :n] = torch.tensor(s.tokens)
        positions[:, i, :n] = torch.from_numpy(s.positions.copy())
        labels[i, :n] = torch.from_numpy(s.labels)
        roles[i, : len(s.roles)] = torch.tensor(s.roles, dtype=torch.long)
    return ids, positions, labels, roles


def train_planner(tokenizer: Any, folder: Path, steps: int, line_steps: int, whole_steps: int) -> TrainedPlanner:
    """`steps` on sequences with rows left out, `line_steps` mostly on lines, then `whole_steps` in equal parts on
    lines, edits and whole sequences."""
    model, draw = TrainedPlanner(tokenizer).to(device()), Sequences(tokenizer)
    kind_of = of_codes(VISION_VOCABULARY)[:, 0].to(device())

    def loss_on(sequences: list[Sequence], length: int, is_edit: bool) -> tuple[Tensor, Losses]:
        ids, positions, labels, roles = (t.to(device()) for t in collate(sequences, length, tokenizer.pad_token_id))
        with autocast():
            hidden, hinted = model(ids, positions)
            hints = {name: hint(hinted) for name, hint in model.hints.items()}
            chosen = labels != IGNORED
            logits = F.linear(hidden[chosen], model.head())
        target = labels[chosen]
        # Where something begins is what has to be decided; the rest follows from it.
        begins = kind_of[target] != kind_of[ids[chosen].clamp(max=VISION_VOCABULARY - 1)]
        weight = torch.where(begins, 4.0, 1.0)
        loss = (F.cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()
        is_cell = ids < codes.CODEBOOK
        cells = torch.where(is_cell, positions - positions[:1], IGNORED)  # time is where a grid starts
        wanted = {"role": roles, "row": cells[1], "column": cells[2]}
        for name, hint in hints.items():
            if (wanted[name] != IGNORED).any():
                loss = loss + HINT_WEIGHT * F.cross_entropy(hint.float().flatten(0, 1), wanted[name].flatten())
        with torch.no_grad():
            right = logits.argmax(-1) == target
            line = (target >= codes.LINE) & (target < codes.SHAPE)
            shape = (target >= codes.SHAPE) & (target < codes.CODEBOOK)
            figures = {
                "plain": right[~line & ~shape], "line": right[line & ~begins], "shape": right[shape & ~begins],
                "line-begins": right[line & begins], "shape-begins": right[shape & begins],
            }  # fmt: skip
            named = {("edit-" if is_edit else "") + k: v.float().mean().item() for k, v in figures.items() if len(v)}
            for name, hint in hints.items():
                asked = wanted[name] != IGNORED
                if asked.any():
                    named[name] = (hint.argmax(-1) == wanted[name])[asked].float().mean().item()
        return loss, {"loss": loss.item(), **named}

    def only_lines(rng: Random) -> tuple[Tensor, Losses]:
        loss, figures = loss_on([draw.generation(rng, *rng.choice(GRIDS), 0, True) for _ in range(64)], 96, False)
        return loss, {f"only-{name}": value for name, value in figures.items()}

    def on_rows(step: int, rng: Random) -> tuple[Tensor, Losses]:
        if step % 5 in (2, 4):
            grids = [(8, 8)] * 3 + [(8, 12), (12, 8)]
            return loss_on([draw.edit(rng, *rng.choice(grids), 256) for _ in range(24)], 256, True)
        return loss_on([draw.generation(rng, *rng.choice(GRIDS), 128) for _ in range(48)], 128, False)

    def on_lines(step: int, rng: Random) -> tuple[Tensor, Losses]:
        if step % 6 == 5:
            return on_rows(step // 6, rng)
        return only_lines(rng)

    def on_whole(step: int, rng: Random) -> tuple[Tensor, Losses]:
        kind, turn = step % 3, step // 3
        if kind == 0:
            return only_lines(rng)
        if kind == 1:
            grid, length = ((8, 8), 176) if turn % 4 else (rng.choice(GRIDS[1:3]), 256)
            return loss_on([draw.edit(rng, *grid, length) for _ in range(24)], length, True)
        if turn % 4 == 3:
            return loss_on([draw.generation(rng, 16, 16, None) for _ in range(8)], 560, False)
        return loss_on([draw.generation(rng, *rng.choice(GRIDS[:3]), None) for _ in range(12)], 400, False)

    train("planner-rows", model, on_rows, folder, steps=steps, learning_rate=2e-3)
    train("planner-lines", model, on_lines, folder, steps=line_steps, learning_rate=1e-3)
    train("planner", model, on_whole, folder, steps=whole_steps, learning_rate=1e-3, average=0.99)
    return model
