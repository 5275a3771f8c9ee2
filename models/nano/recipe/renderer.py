"""Training of the renderer: from noise, a plan and glyph embeddings to latents.

First it learns only to read: which letter belongs where, from pure noise. Then to draw posters, edits (source image at
timestep 0), and single lines of either. The forward pass is the published one, reduced, with missing glyphs masked.
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
    LINE_WEIGHT,
    NO_LETTER,
    PLAIN_WEIGHT,
    SHAPE_WEIGHT,
    Batch,
    BatchBuilder,
    LatentPool,
)
from models.nano.recipe.factored import FactoredTable, code_factors
from models.nano.recipe.loop import IGNORED, Losses, autocast, device, train

HEADS, HEAD_DIM = 4, 64
DIM = HEADS * HEAD_DIM
CHANNELS = 8
MAX_GLYPHS = 3 * glyphs.TOKENS
HINT_WEIGHT = 0.1  # beside the velocity's 1
HINTED_BLOCKS = {"left place": 1, "right place": 1, "left letter": 2, "right letter": 2, "cell part": 1}
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
    """The published parameters and the glyph encoder's, with a factored table of codes."""

    def __init__(self, encoder: T5EncoderModel):
        super().__init__()
        self.glyphs = encoder
        self.renderer: Any = make_renderer()
        self.renderer.prior_token_embedding = nn.Identity()
        self.codes = FactoredTable(code_factors(), DIM, 0.6, 0.1)
        self.hints = nn.ModuleDict({name: nn.Linear(DIM, n) for name, n in HINTS.items()})
        # One for all blocks: compiled once per size.
        torch._dynamo.config.recompile_limit = 64
        self.block = torch.compile(_block, dynamic=False)

    def forward(
        self, batch: Batch, noisy: Tensor, sigma: Tensor, only_hints: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the velocity [b, c, h, w] (noise minus latents) at `sigma` [b], and the logits of `HINTS`.

        With `only_hints`, stop after the last hint, without a velocity.
        """
        model, table = self.renderer, self.codes()
        b, _, height, width = noisy.shape
        size = torch.tensor([batch.size], dtype=torch.float32, device=device()).expand(b, 2)
        zeros = torch.zeros(b, 2, device=device())
        times = model.time_condition_embed(sigma * 1000 - 1, size, zeros, torch.float32)
        glyph, mask = self._glyphs(batch.strings)
        plan = F.embedding(batch.plan, table) * batch.conditioned[:, None, None]
        x = (model.image_projector(noisy) + model.prior_projector(plan)).to(torch.bfloat16)
        y = model.glyph_projector(glyph).to(torch.bfloat16)
        cos, sin = (r[None, None].to(x.dtype) for r in model.rope(noisy))
        n, source = x.shape[1], None
        if batch.source is not None and batch.source_plan is not None:
            image = model.image_projector(batch.source)
            image = image + model.prior_projector(F.embedding(batch.source_plan, table))
            start = model.time_condition_embed(torch.zeros(b, device=device()), size, zeros, torch.float32)
            source = (image.to(x.dtype), start)
        visible = mask.new_zeros(b, n)
        bias = torch.cat([visible, ~mask, visible] if source else [~mask, visible], 1)[:, None, None].to(x.dtype) * -1e4
        hints: dict[str, Tensor] = {}
        for index, block in enumerate(model.transformer_blocks):
            x, y, image = self.block(block, x, y, bias, times, cos, sin, source)
            source = (image, source[1]) if source and image is not None else None
            hints |= {name: self.hints[name](x) for name, hinted in HINTED_BLOCKS.items() if hinted == index}
            if only_hints and index == max(HINTED_BLOCKS.values()):
                return noisy, hints
        scale, shift = model.norm_out.linear(times)[:, None].chunk(2, -1)
        out = model.proj_out(_norm(x) * (1 + scale) + shift)
        out = out.reshape(b, height // 2, width // 2, CHANNELS, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(b, CHANNELS, height, width).float(), hints

    def _glyphs(self, strings: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Return embeddings [b, MAX_GLYPHS, dim] of each sample's strings, and their mask."""
        ids = [glyphs.string_ids(s) for s in strings]
        flat = [i for sample in ids for i in sample]
        flat += [[glyphs.END]] * (3 * len(strings) - len(flat))  # to a fixed shape
        tokens, mask = glyphs.batch_ids(flat)
        hidden = self.glyphs(tokens, attention_mask=mask).last_hidden_state.flatten(0, 1)
        index = torch.zeros(len(strings), MAX_GLYPHS, dtype=torch.long, device=device())
        present = torch.zeros(len(strings), MAX_GLYPHS, dtype=torch.bool, device=device())
        first = 0  # string of the sample
        for b, sample in enumerate(ids):
            places = [(first + k) * glyphs.TOKENS + j for k, i in enumerate(sample) for j in range(len(i))]
            index[b, : len(places)] = torch.tensor(places, device=device())
            present[b, : len(places)] = True
            first += len(sample)
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
    """Apply one block to image tokens x [b, n, d], glyph tokens y [b, g, d] and the source's image tokens.

    `bias` [b, 1, 1, keys] masks missing glyphs; `times` and `source[1]` are [b, e].
    """
    attention, g = block.attn1, y.shape[1]
    parts = block.norm1.linear(times)[:, None].chunk(12, -1)
    shift, y_shift, scale, y_scale, gate, y_gate, shift2, y_shift2, scale2, y_scale2, gate2, y_gate2 = parts
    joint = torch.cat([_norm(y) * (1 + y_scale) + y_shift, _norm(x) * (1 + scale) + shift], 1)
    q, k, v = _project(attention, joint)
    q, k = _rotate_tail(q, g, cos, sin), _rotate_tail(k, g, cos, sin)
    new_source = None
    if source is not None:
        s, start = source
        modulation = block.norm1.linear(start)[:, None].chunk(12, -1)
        sq, sk, sv = _project(attention, _norm(s) * (1 + modulation[2]) + modulation[0])
        sq, sk = _rotate_tail(sq, 0, cos, sin), _rotate_tail(sk, 0, cos, sin)
        attended = F.scaled_dot_product_attention(sq, sk, sv).transpose(1, 2).flatten(2)
        s = s + attention.to_out[0](attended) * modulation[4]
        new_source = s + block.ff(_norm(s) * (1 + modulation[8]) + modulation[6]) * modulation[10]
        k, v = torch.cat([sk, k], 2), torch.cat([sv, v], 2)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    attended = attention.to_out[0](attended)
    x, y = x + attended[:, g:] * gate, y + attended[:, :g] * y_gate
    joint = torch.cat([_norm(y) * (1 + y_scale2) + y_shift2, _norm(x) * (1 + scale2) + shift2], 1)
    output = block.ff(joint)
    return x + output[:, g:] * gate2, y + output[:, :g] * y_gate2, new_source


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=1e-5).to(torch.bfloat16)


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        project(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    return _norm(q), _norm(k), v.to(torch.bfloat16)


def _rotate_tail(x: Tensor, head: int, cos: Tensor, sin: Tensor) -> Tensor:
    unrotated, rotated = x[:, :, :head], x[:, :, head:]
    a, b = rotated.chunk(2, -1)
    return torch.cat([unrotated, rotated * cos + torch.cat([-b, a], -1) * sin], 2)


def velocity_loss(model: TrainedRenderer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted squared error of the velocity plus the hints' losses, and figures.

    Most timesteps are near pure noise: the image has to come from plan and letters.
    """
    b = len(batch.latents)
    choice, uniform = torch.rand(2, b, device=device())
    sigma = torch.where(choice < 0.3, uniform, 1 - uniform.square()).clamp(1e-3, 1)
    noise = torch.randn_like(batch.latents)
    share = sigma.view(-1, 1, 1, 1)
    noisy = (1 - share) * batch.latents + share * noise
    with autocast():
        velocity, hints = model(batch, noisy, sigma)
    square = (velocity - (noise - batch.latents)).square()
    loss = (square * batch.weight).mean()
    targets = _hint_targets(batch)
    loss = loss + HINT_WEIGHT * sum(_hint_losses(hints, targets))
    conditioned = batch.conditioned.view(-1, 1, 1, 1).bool()
    with torch.no_grad():
        means = {
            name: square[(batch.weight.eq(w) & conditioned).expand_as(square)].mean().item()
            for name, w in (("line", LINE_WEIGHT), ("shape", SHAPE_WEIGHT), ("plain", PLAIN_WEIGHT))
        }
        right = _hint_accuracies(hints, targets)
        means |= {"place": right["left place"], "letter": right["left letter"], "part": right["cell part"]}
    return loss, {name: value for name, value in means.items() if not math.isnan(value)}


def _hint_targets(batch: Batch) -> dict[str, Tensor]:
    """Return the targets [b, n] of `HINTS`, IGNORED where plan and glyphs are dropped."""
    targets = batch.hints.masked_fill(batch.conditioned.view(-1, 1, 1, 1) == 0, IGNORED).flatten(1, 2).unbind(-1)
    return dict(zip(HINTS, targets, strict=True))


def _hint_losses(hints: dict[str, Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
    """Return the cross entropy of each hint, 0 without targets."""
    counts = {name: (targets[name] != IGNORED).sum().clamp(min=1) for name in hints}
    return [
        F.cross_entropy(hint.float().flatten(0, 1), targets[name].flatten(), reduction="sum") / counts[name]
        for name, hint in hints.items()
    ]


def _hint_accuracies(hints: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    """Return accuracies, of places and letters on letters only; nan without."""
    letter = (targets["left letter"] != NO_LETTER) & (targets["left letter"] != IGNORED)
    shape = targets["cell part"] != IGNORED
    return {
        name: (hint.argmax(-1) == targets[name])[shape if name == "cell part" else letter].float().mean().item()
        for name, hint in hints.items()
    }


def reading_loss(model: TrainedRenderer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the hints' losses on pure noise, and figures."""
    b = len(batch.latents)
    with autocast():
        _, hints = model(batch, torch.randn_like(batch.latents), torch.ones(b, device=device()), only_hints=True)
    targets = _hint_targets(batch)
    right = _hint_accuracies(hints, targets)
    return torch.stack(_hint_losses(hints, targets)).sum(), {n: v for n, v in right.items() if not math.isnan(v)}


class RendererTraining:
    """Batches and losses of each step."""

    def __init__(self, model: TrainedRenderer, folder: Path, mean: Tensor, std: Tensor):
        self.model, self.batches = model, BatchBuilder(mean, std)
        sizes = ((256, 256), (384, 256), (256, 384), (512, 512))
        self.square, self.wide, self.tall, self.large = (LatentPool(folder, *size) for size in sizes)
        self.edited = LatentPool(folder, 256, 256, edits=True)

    def _refresh(self, step: int) -> None:
        for pool in (self.square, self.wide, self.tall, self.large, self.edited):
            if step % 100 == 0 or not pool.shards:
                pool.refresh()

    def on_reading(self, step: int, rng: Random) -> tuple[Tensor, Losses]:
        self._refresh(step)
        is_large = step % 4 == 3
        batch = self.batches.lines(rng, self.large if is_large else self.square, 24 if is_large else 96)
        loss, figures = reading_loss(self.model, batch)
        return loss, {"loss": loss.item(), **figures}

    def on_all(self, step: int, rng: Random) -> tuple[Tensor, Losses]:
        self._refresh(step)
        batches = self.batches
        match name := TURNS[step % len(TURNS)]:
            case "lines":
                batch = batches.lines(rng, self.square, 96)
            case "large-lines":
                batch = batches.lines(rng, self.large, 24)
            case "edit":
                batch = batches.edits(rng, self.edited, 10)
            case "edit-lines":
                batch = batches.edit_lines(rng, self.edited, 80)
            case "oblong":
                batch = batches.posters(rng, rng.choice((self.wide, self.tall)), 10)
            case "large":
                batch = batches.posters(rng, self.large, 4)
            case _:
                batch = batches.posters(rng, self.square, 16)
        loss, figures = velocity_loss(self.model, batch)
        return loss, {"loss": loss.item(), **{f"{name}-{k}": v for k, v in figures.items()}}


def train_renderer(
    encoder: T5EncoderModel, folder: Path, mean: Tensor, std: Tensor, reading_steps: int, steps: int
) -> TrainedRenderer:
    """Train reading alone, then everything, with the glyph encoder frozen."""
    encoder.requires_grad_(False)
    model = TrainedRenderer(encoder).to(device())
    training = RendererTraining(model, folder, mean, std)
    train("renderer-reading", model, training.on_reading, folder, steps=reading_steps, learning_rate=1e-3)
    train("renderer", model, training.on_all, folder, steps=steps, learning_rate=1e-3, average=0.995)
    return model


def continue_renderer(model: TrainedRenderer, folder: Path, mean: Tensor, std: Tensor, steps: int) -> TrainedRenderer:
    """Train everything further, the glyph encoder, too, which may know shorter strings only."""
    training = RendererTraining(model.to(device()), folder, mean, std)
    train("renderer", model, training.on_all, folder, steps=steps, learning_rate=7e-4, average=0.995)
    return model
