"""The renderer: from noise, a plan and the glyph encoder's embeddings to latents.

First it learns to read alone: to say, from pure noise, which letter of which string belongs where. Then to draw, on
latents computed beforehand: whole posters, edits (the picture before, at timestep 0, is read through its keys and
values), and single lines of text cut out of either, which are an eighth of a poster and nothing but letters. The
forward pass is the published one, without what training does not need and with a true mask over missing glyph tokens.
"""

import math
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from models.nano.recipe import codes, glyphs
from models.nano.recipe.batches import (
    HINTS,
    IGNORED,
    LINE_WEIGHT,
    NO_LETTER,
    PLAIN_WEIGHT,
    SHAPE_WEIGHT,
    Batch,
    Batches,
    Pictures,
)
from models.nano.recipe.factored import FactoredTable, of_codes
from models.nano.recipe.loop import Losses, autocast, device, train

HEADS, HEAD_DIM = 4, 64
DIM = HEADS * HEAD_DIM
CHANNELS = 8
MAX_GLYPHS = 24
# At which block the hints are asked for, and what they count beside the velocity.
HINT_WEIGHT = 0.1
HINTED_BLOCKS = {"left place": 1, "right place": 1, "left letter": 2, "right letter": 2, "cell part": 1}
# What the steps of the drawing take in turn.
TURNS = ("poster", "lines", "edit", "large-lines", "oblong", "edit-lines", "poster", "large", "lines", "edit-lines")


def make_renderer() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    model: Any = GlmImageTransformer2DModel(
        patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=6, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, text_embed_dim=glyphs.DIM, time_embed_dim=32, condition_dim=32,
        prior_vq_quantizer_codebook_size=codes.CODEBOOK,
    )  # fmt: skip
    zero = [block.norm1.linear for block in model.transformer_blocks] + [model.norm_out.linear, model.proj_out]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class TrainedRenderer(nn.Module):
    """The published module's parameters with the glyph encoder's, and a factored table of codes."""

    def __init__(self, encoder: T5EncoderModel):
        super().__init__()
        self.glyphs = encoder
        self.renderer: Any = make_renderer()
        self.renderer.prior_token_embedding = nn.Identity()
        self.codes = FactoredTable(of_codes(), DIM, 0.6, 0.1)
        self.hints = nn.ModuleDict({name: nn.Linear(DIM, n) for name, n in HINTS.items()})
        # One block is compiled for all: a compilation per size, not per size and block.
        torch._dynamo.config.recompile_limit = 64
        self.block = torch.compile(_block, dynamic=False)

    def forward(
        self, batch: "Batch", noisy: Tensor, sigma: Tensor, only_hints: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[b, c, h, w] velocity (noise minus picture) at `sigma` [b], and what `HINTS` are guessed to be.

        With `only_hints` the blocks after the last hint are left out, and so is the velocity.
        """
        model, table = self.renderer, self.codes()
        b, _, height, width = noisy.shape
        size = torch.tensor([batch.size], dtype=torch.float32, device=device()).expand(b, 2)
        zeros = torch.zeros(b, 2, device=device())
        times = model.time_condition_embed(sigma * 1000 - 1, size, zeros, torch.float32)
        glyph, mask = self._glyphs(batch.strings)
        plan = F.embedding(batch.plan, table) * batch.kept[:, None, None]
        x = (model.image_projector(noisy) + model.prior_projector(plan)).to(torch.bfloat16)
        y = model.glyph_projector(glyph).to(torch.bfloat16)
        cos, sin = (r[None, None].to(x.dtype) for r in model.rope(noisy))
        n, source = x.shape[1], None
        if batch.source is not None and batch.source_plan is not None:
            image = model.image_projector(batch.source)
            image = image + model.prior_projector(F.embedding(batch.source_plan, table))
            start = model.time_condition_embed(torch.zeros(b, device=device()), size, zeros, torch.float32)
            source = (image.to(x.dtype), start)
        seen = mask.new_zeros(b, n)
        bias = torch.cat([seen, ~mask, seen] if source else [~mask, seen], 1)[:, None, None].to(x.dtype) * -1e4
        hints: dict[str, Tensor] = {}
        for index, block in enumerate(model.transformer_blocks):
            x, y, image = self.block(block, x, y, bias, times, cos, sin, source)
            source = (image, source[1]) if source and image is not None else None
            hints |= {name: self.hints[name](x) for name, at in HINTED_BLOCKS.items() if at == index}
            if only_hints and index == max(HINTED_BLOCKS.values()):
                return noisy, hints
        scale, shift = model.norm_out.linear(times)[:, None].chunk(2, -1)
        out = model.proj_out(_norm(x) * (1 + scale) + shift)
        out = out.reshape(b, height // 2, width // 2, CHANNELS, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(b, CHANNELS, height, width).float(), hints

    def _glyphs(self, strings: list[list[str]]) -> tuple[Tensor, Tensor]:
        """[b, MAX_GLYPHS, dim] embeddings and their mask, of each sample's strings."""
        ids = [glyphs.string_ids(s) for s in strings]
        flat = [i for sample in ids for i in sample]
        flat += [[glyphs.END]] * (2 * len(strings) - len(flat))  # a fixed shape
        tokens, mask = glyphs.batch_ids(flat)
        hidden = self.glyphs(tokens, attention_mask=mask).last_hidden_state.flatten(0, 1)
        index = torch.zeros(len(strings), MAX_GLYPHS, dtype=torch.long, device=device())
        present = torch.zeros(len(strings), MAX_GLYPHS, dtype=torch.bool, device=device())
        row = 0
        for b, sample in enumerate(ids):
            places = [(row + k) * glyphs.TOKENS + j for k, i in enumerate(sample) for j in range(len(i))]
            index[b, : len(places)] = torch.tensor(places, device=device())
            present[b, : len(places)] = True
            row += len(sample)
        return hidden[index], present


def _block(
    block: Any,
    x: Tensor,
    y: Tensor,
    bias: Tensor,
    times: Tensor,
    cos: Tensor,
    sin: Tensor,
    source: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block, over image tokens x [b, n, d], glyph tokens y [b, g, d] and, for an edit, the source's image tokens.

    `bias` [b, 1, 1, keys] hides missing glyphs; `times` and `source[1]` [b, e] are the embedded timesteps.
    """
    attention, g = block.attn1, y.shape[1]
    parts = block.norm1.linear(times)[:, None].chunk(12, -1)
    shift, y_shift, scale, y_scale, gate, y_gate, shift2, y_shift2, scale2, y_scale2, gate2, y_gate2 = parts
    joint = torch.cat([_norm(y) * (1 + y_scale) + y_shift, _norm(x) * (1 + scale) + shift], 1)
    q, k, v = _project(attention, joint)
    q, k = _rotate_tail(q, g, cos, sin), _rotate_tail(k, g, cos, sin)
    read_from = None
    if source is not None:
        s, start = source
        own = block.norm1.linear(start)[:, None].chunk(12, -1)
        sq, sk, sv = _project(attention, _norm(s) * (1 + own[2]) + own[0])
        sq, sk = _rotate_tail(sq, 0, cos, sin), _rotate_tail(sk, 0, cos, sin)
        read = F.scaled_dot_product_attention(sq, sk, sv).transpose(1, 2).flatten(2)
        s = s + attention.to_out[0](read) * own[4]
        read_from = s + block.ff(_norm(s) * (1 + own[8]) + own[6]) * own[10]
        k, v = torch.cat([sk, k], 2), torch.cat([sv, v], 2)
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    read = attention.to_out[0](read)
    x, y = x + read[:, g:] * gate, y + read[:, :g] * y_gate
    joint = torch.cat([_norm(y) * (1 + y_scale2) + y_shift2, _norm(x) * (1 + scale2) + shift2], 1)
    made = block.ff(joint)
    return x + made[:, g:] * gate2, y + made[:, :g] * y_gate2, read_from


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=1e-5).to(torch.bfloat16)


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        project(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    return _norm(q), _norm(k), v.to(torch.bfloat16)


def _rotate_tail(x: Tensor, head: int, cos: Tensor, sin: Tensor) -> Tensor:
    still, turned = x[:, :, :head], x[:, :, head:]
    a, b = turned.chunk(2, -1)
    return torch.cat([still, turned * cos + torch.cat([-b, a], -1) * sin], 2)


def velocity_loss(model: TrainedRenderer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Weighted squared error of the velocity, at timesteps drawn rather towards pure noise.

    A picture of this world follows from its plan and its letters, so all is decided there; further on, the noisy
    picture itself shows what is to be drawn, and teaches nothing about plan and letters.
    """
    b = len(batch.latents)
    choice, even = torch.rand(2, b, device=device())
    sigma = torch.where(choice < 0.3, even, 1 - even.square()).clamp(1e-3, 1)
    noise = torch.randn_like(batch.latents)
    at = sigma.view(-1, 1, 1, 1)
    noisy = (1 - at) * batch.latents + at * noise
    with autocast():
        made, hints = model(batch, noisy, sigma)
    square = (made - (noise - batch.latents)).square()
    loss = (square * batch.weight).mean()
    wanted = _wanted_hints(batch)
    loss = loss + HINT_WEIGHT * sum(_hint_losses(hints, wanted))
    kept = batch.kept.view(-1, 1, 1, 1).bool()
    with torch.no_grad():
        means = {
            name: square[(batch.weight.eq(w) & kept).expand_as(square)].mean().item()
            for name, w in (("line", LINE_WEIGHT), ("shape", SHAPE_WEIGHT), ("plain", PLAIN_WEIGHT))
        }
        right = _right_hints(hints, wanted)
        means |= {"place": right["left place"], "letter": right["left letter"], "part": right["cell part"]}
    return loss, {name: value for name, value in means.items() if not math.isnan(value)}


def _wanted_hints(batch: Batch) -> dict[str, Tensor]:
    """[b, n] what `HINTS` should be; nothing where plan and glyphs are dropped."""
    wanted = batch.hints.masked_fill(batch.kept.view(-1, 1, 1, 1) == 0, IGNORED).flatten(1, 2).unbind(-1)
    return dict(zip(HINTS, wanted, strict=True))


def _hint_losses(hints: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[Tensor]:
    """Cross entropy of each hint, 0 where a batch has nothing to ask of it."""
    asked = {name: (wanted[name] != IGNORED).sum().clamp(min=1) for name in hints}
    return [
        F.cross_entropy(hint.float().flatten(0, 1), wanted[name].flatten(), reduction="sum") / asked[name]
        for name, hint in hints.items()
    ]


def _right_hints(hints: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Share of right guesses, those about lines where there is a letter; nan where there is nothing to guess."""
    letter = (wanted["left letter"] != NO_LETTER) & (wanted["left letter"] != IGNORED)
    shape = wanted["cell part"] != IGNORED
    return {
        name: (hint.argmax(-1) == wanted[name])[shape if name == "cell part" else letter].float().mean().item()
        for name, hint in hints.items()
    }


def reading_loss(model: TrainedRenderer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """What the hints are wrong about, from nothing but noise."""
    b = len(batch.latents)
    with autocast():
        _, hints = model(batch, torch.randn_like(batch.latents), torch.ones(b, device=device()), only_hints=True)
    wanted = _wanted_hints(batch)
    right = _right_hints(hints, wanted)
    return torch.stack(_hint_losses(hints, wanted)).sum(), {n: v for n, v in right.items() if not math.isnan(v)}


def train_renderer(
    encoder: T5EncoderModel, folder: Path, mean: Tensor, std: Tensor, reading_steps: int, steps: int
) -> TrainedRenderer:
    """First reading alone, then everything. The glyph encoder stays as it is: it is what reading is learnt from."""
    encoder.requires_grad_(False)
    model, batches = TrainedRenderer(encoder).to(device()), Batches(mean, std)
    square, wide, tall, large = (Pictures(folder, *size) for size in ((256, 256), (384, 256), (256, 384), (512, 512)))
    edited = Pictures(folder, 256, 256, edits=True)

    def refresh(step: int) -> None:
        for pictures in (square, wide, tall, large, edited):
            if step % 100 == 0 or not pictures.shards:
                pictures.refresh()

    def on_reading(step: int, rng: Random) -> tuple[Tensor, Losses]:
        refresh(step)
        batch = batches.lines(rng, large, 24) if step % 4 == 3 else batches.lines(rng, square, 96)
        loss, figures = reading_loss(model, batch)
        return loss, {"loss": loss.item(), **figures}

    def on_all(step: int, rng: Random) -> tuple[Tensor, Losses]:
        refresh(step)
        match name := TURNS[step % len(TURNS)]:
            case "lines":
                batch = batches.lines(rng, square, 96)
            case "large-lines":
                batch = batches.lines(rng, large, 24)
            case "edit":
                batch = batches.edits(rng, edited, 10)
            case "edit-lines":
                batch = batches.edit_lines(rng, edited, 80)
            case "oblong":
                batch = batches.posters(rng, rng.choice((wide, tall)), 10)
            case "large":
                batch = batches.posters(rng, large, 4)
            case _:
                batch = batches.posters(rng, square, 16)
        loss, figures = velocity_loss(model, batch)
        return loss, {"loss": loss.item(), **{f"{name}-{k}": v for k, v in figures.items()}}

    train("renderer-reading", model, on_reading, folder, steps=reading_steps, learning_rate=1e-3)
    train("renderer", model, on_all, folder, steps=steps, learning_rate=1e-3, average=0.995)
    return model
