"""Training of the planner: from a prompt's tokens to the codes of preview and plan.

Three phases: sequences with rows left out; mostly the preview's lines; lines, edits and whole sequences. The last can
start from the weights of a checkpoint.
The forward pass is the published one, reduced so that it compiles well.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from models.nano.recipe import codes
from models.nano.recipe.factored import FactoredTable, code_factors, vocabulary_factors
from models.nano.recipe.loop import IGNORED, Losses, autocast, device, train
from models.nano.recipe.planner_sequences import FACT_HINTS, PROMPT_HINTS, PlannerSequence, SequenceSampler, collate
from models.nano.recipe.tokenizer import IMAGE_END, IMAGE_START, VISION_VOCABULARY

HIDDEN = 192
GRIDS = ((8, 8), (8, 12), (12, 8), (16, 16))
# Auxiliary targets of a middle layer: see PROMPT_HINTS; row and column of each cell.
HINTED_LAYER = 2
LINES_LENGTH = 128  # of a prompt and the rows in which something can begin; 1 in 60 is longer
HINT_WEIGHT, FACT_WEIGHT = 0.3, 0.05
HINTS = PROMPT_HINTS | {"row": 32, "column": 32}


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
    """The published parameters, with factored tables at both ends."""

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
        self.embedding = FactoredTable(vocabulary_factors(tokenizer, vocabulary), HIDDEN, 0.6, 0.6)
        self.head = FactoredTable(code_factors(VISION_VOCABULARY), HIDDEN, 0.04, 0.0)
        for part, source in zip(self.head.parts, self.embedding.parts, strict=True):
            part.data.copy_(source.data * 0.06)
        self.hints = nn.ModuleDict({name: nn.Linear(HIDDEN, n) for name, n in HINTS.items()})
        torch._dynamo.config.recompile_limit = 64  # one per length, with and without gradients
        self.layers = torch.compile(_layers, dynamic=False)

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states [b, t, hidden] after the last layer and after `HINTED_LAYER`.

        `ids` are [b, t], `positions` [3, b, t].
        """
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
        y = rms(x, layer.input_layernorm.weight)
        q, k, v = (
            project(y).view(b, t, -1, dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = attention.num_key_value_groups
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + rms(attention.o_proj(y), layer.post_self_attn_layernorm.weight)
        gate, up = layer.mlp.gate_up_proj(rms(x, layer.post_attention_layernorm.weight)).chunk(2, -1)
        x = x + rms(layer.mlp.down_proj(up * F.silu(gate)), layer.post_mlp_layernorm.weight)
        if index == HINTED_LAYER:
            hinted = x
    return rms(x, text.norm.weight), hinted


def rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, unrotated = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-b, a], -1) * sin, unrotated], -1)


class PlannerTraining:
    def __init__(self, tokenizer: Any):
        self.model = TrainedPlanner(tokenizer).to(device())
        self.sampler = SequenceSampler(tokenizer)
        self.pad: int = tokenizer.pad_token_id
        self.kind_of = code_factors(VISION_VOCABULARY)[:, 0].to(device())

    def loss_on(self, sequences: list[PlannerSequence], length: int, is_edit: bool) -> tuple[Tensor, Losses]:
        """Return cross entropy of codes and hints, and accuracies."""
        ids, positions, labels, targets = collate(sequences, length, self.pad)
        ids, positions, labels = ids.to(device()), positions.to(device()), labels.to(device())
        with autocast():
            hidden, hinted = self.model(ids, positions)
            hints = {name: hint(hinted) for name, hint in self.model.hints.items()}
            has_label = labels != IGNORED
            logits = F.linear(hidden[has_label], self.model.head())
        target = labels[has_label]
        # The model decides where something begins; the rest follows.
        begins = self.kind_of[target] != self.kind_of[ids[has_label].clamp(max=VISION_VOCABULARY - 1)]
        weight = torch.where(begins, 4.0, 1.0)
        loss = (F.cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()
        cells = torch.where(ids < codes.CODEBOOK, positions - positions[:1], IGNORED)  # time is where a grid starts
        targets = {name: hint.to(device()) for name, hint in targets.items()} | {"row": cells[1], "column": cells[2]}
        for name, hint in hints.items():
            if (targets[name] != IGNORED).any():
                share = FACT_WEIGHT if name in FACT_HINTS else HINT_WEIGHT
                loss = loss + share * F.cross_entropy(hint.float().flatten(0, 1), targets[name].flatten())
        accuracies = _code_accuracies(logits, target, begins)
        named = {f"edit-{name}" if is_edit else name: value for name, value in accuracies.items()}
        return loss, {"loss": loss.item(), **named, **_hint_accuracies(hints, targets)}

    def on_only_lines(self, rng: Random) -> tuple[Tensor, Losses]:
        sequences: list[PlannerSequence] = []
        while len(sequences) < 40:
            sequence = self.sampler.generation(rng, *rng.choice(GRIDS), 0, True)
            sequences += [sequence] * (len(sequence.tokens) <= LINES_LENGTH)
        loss, figures = self.loss_on(sequences, LINES_LENGTH, False)
        return loss, {f"only-{name}": value for name, value in figures.items()}

    def on_rows(self, step: int, rng: Random) -> tuple[Tensor, Losses]:
        if step % 5 in (2, 4):
            grids = [(8, 8)] * 3 + [(8, 12), (12, 8)]
            return self.loss_on([self.sampler.edit(rng, *rng.choice(grids), 256) for _ in range(24)], 256, True)
        return self.loss_on([self.sampler.generation(rng, *rng.choice(GRIDS), 144) for _ in range(48)], 144, False)

    def on_lines(self, step: int, rng: Random) -> tuple[Tensor, Losses]:
        if step % 6 == 5:
            return self.on_rows(step // 6, rng)
        return self.on_only_lines(rng)

    def on_whole(self, step: int, rng: Random, period: int = 3) -> tuple[Tensor, Losses]:
        """Train on lines, but for an edit and whole sequences once in `period` steps."""
        kind, turn = step % period, step // period
        if kind not in (1, 2):
            return self.on_only_lines(rng)
        if kind == 1:
            grid, length = ((8, 8), 176) if turn % 4 else (rng.choice(GRIDS[1:3]), 256)
            return self.loss_on([self.sampler.edit(rng, *grid, length) for _ in range(24)], length, True)
        if turn % 4 == 3:
            return self.loss_on([self.sampler.generation(rng, 16, 16, None) for _ in range(8)], 580, False)
        sequences = [self.sampler.generation(rng, *rng.choice(GRIDS[:3]), None) for _ in range(12)]
        return self.loss_on(sequences, 420, False)

    def on_free_prompts(self, step: int, rng: Random) -> tuple[Tensor, Losses]:
        """Train a planner that knows the small grammar: mostly what begins where."""
        return self.on_whole(step, rng, period=6)


@torch.no_grad()
def _code_accuracies(logits: Tensor, target: Tensor, begins: Tensor) -> dict[str, float]:
    """Return the share of right codes by kind."""
    right = logits.argmax(-1) == target
    line = torch.from_numpy(codes.is_text(target.cpu().numpy())).to(target.device)
    shape = (target >= codes.SHAPE) & (target < codes.CODEBOOK) & ~line
    by_kind = {
        "plain": right[~line & ~shape], "line": right[line & ~begins], "shape": right[shape & ~begins],
        "line-begins": right[line & begins], "shape-begins": right[shape & begins],
    }  # fmt: skip
    return {name: values.float().mean().item() for name, values in by_kind.items() if len(values)}


@torch.no_grad()
def _hint_accuracies(hints: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    accuracies = {}
    for name, hint in hints.items():
        has_target = targets[name] != IGNORED
        if has_target.any():
            accuracies[name] = (hint.argmax(-1) == targets[name])[has_target].float().mean().item()
    return accuracies


def train_planner(tokenizer: Any, folder: Path, steps: int, line_steps: int, whole_steps: int) -> TrainedPlanner:
    """Train the three phases."""
    training = PlannerTraining(tokenizer)
    model = training.model
    train("planner-rows", model, training.on_rows, folder, steps=steps, learning_rate=2e-3)
    train("planner-lines", model, training.on_lines, folder, steps=line_steps, learning_rate=1e-3)
    train("planner", model, training.on_whole, folder, steps=whole_steps, learning_rate=1e-3, average=0.99)
    return model


def continue_planner(
    tokenizer: Any, folder: Path, start: Callable[[TrainedPlanner], None], hint_steps: int, steps: int
) -> TrainedPlanner:
    """Train from the weights that `start` sets: the hints alone, which no checkpoint has, then everything.

    With new hints and a learning rate of 1e-3 the planner forgot the small grammar in 200 steps, before it learned the
    free one.
    """
    training = PlannerTraining(tokenizer)
    model = training.model
    start(model)
    model.requires_grad_(False)
    model.hints.requires_grad_(True)
    train("planner-hints", model, training.on_free_prompts, folder, steps=hint_steps, learning_rate=1e-2, warmup=1)
    model.requires_grad_(True)
    train("planner", model, training.on_free_prompts, folder, steps=steps, learning_rate=4e-4, average=0.995)
    return model
