"""The planner: a decoder-only transformer that generates an image as codebook indices.

    T   packed tokens of many sequences                  H, G   query heads, key/value heads
    D   head dimension                                   R      rotary dimension, R <= D
    C   hidden size                                      V      outputs: image codes, then control tokens

Follows transformers' `GlmImageTextModel` and its weights.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_invariant import Linear, elementwise
from models.glm_image.config import PlannerConfig

Rotary = tuple[Tensor, Tensor]  # cosines and sines [T, R]


class Attention(Protocol):
    """Attends and stores keys and values for later steps."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attended values [T, H, D]; k and v are [T, G, D]."""
        ...


@dataclass(frozen=True)
class PlannerBatch:
    """What layers need to know of a step."""

    rotary: Rotary  # from `RotaryTable.at`
    attend: Attention  # `PrefillAttention` or `DecodeAttention`
    tile_height: int | None = None  # T is a multiple of it


class PlannerAttention(nn.Module):
    def __init__(self, config: PlannerConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = Linear(q_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, batch: PlannerBatch) -> Tensor:
        """Project, attend, project out: [T, C] -> [T, C]."""
        q, k = self.q_proj(x, batch.tile_height), self.k_proj(x, batch.tile_height)
        rotated = rotate(torch.cat([q, k], dim=-1).unflatten(-1, (-1, self.head_dim)), batch.rotary)
        q, k = rotated.split([q.shape[-1] // self.head_dim, k.shape[-1] // self.head_dim], dim=1)
        v = self.v_proj(x, batch.tile_height).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(batch.attend(self.layer_index, q, k, v).flatten(1), batch.tile_height)


class PlannerMLP(nn.Module):
    def __init__(self, config: PlannerConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, batch: PlannerBatch) -> Tensor:
        gate, up = self.gate_up_proj(x, batch.tile_height).chunk(2, dim=-1)
        return self.down_proj(elementwise(F.silu, gate.contiguous()) * up, batch.tile_height)


class PlannerLayer(nn.Module):
    def __init__(self, config: PlannerConfig, layer_index: int):
        super().__init__()
        self.self_attn = PlannerAttention(config, layer_index)
        self.mlp = PlannerMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attn_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: PlannerBatch) -> Tensor:
        """Add attention and MLP, each normalised before and after: [T, C] -> [T, C]."""
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), batch))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x), batch))


class Planner(nn.Module):
    """Scores the next image code of every token."""

    def __init__(self, config: PlannerConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlannerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vision_vocab_size, bias=False)

    def forward(self, tokens: Tensor, batch: PlannerBatch) -> Tensor:
        """Return the hidden states [T, C] of tokens [T]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x)

    def logits(self, hidden: Tensor, tile_height: int | None = None) -> Tensor:
        """Return float32 scores of image codes only: a plan's length is known."""
        return self.lm_head(hidden, tile_height)[:, : self.config.codebook_size].float()


class RotaryTable(nn.Module):
    """M-RoPE: runs of frequencies (`mrope_section`) rotate by temporal position, row, column."""

    cos: Tensor
    sin: Tensor
    axis: Tensor

    def __init__(self, config: PlannerConfig, positions: int, device: torch.device):
        super().__init__()
        half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
        frequency = 1.0 / config.rope_theta ** (half / config.rotary_dim)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        runs = [m % 3 for m in range(len(config.mrope_section))]
        axis = torch.tensor(
            [a for a, n in zip(runs, config.mrope_section, strict=True) for _ in range(n)], device=device
        )
        self.register_buffer("axis", axis, persistent=False)  # [R/2]: which position rotates a frequency

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Look up positions [T, 3]."""
        index = positions[:, self.axis]  # [T, R/2]
        cos, sin = self.cos.gather(0, index), self.sin.gather(0, index)
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([sin, sin], -1).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first R dimensions of x [T, heads, D], i with i + R/2."""
    cos, sin = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)
    rotated, passed = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, passed], dim=-1)


def plan_positions(start: int, grids: list[tuple[int, int]]) -> Tensor:
    """Return positions [tokens, 3] (temporal, row, column) of consecutive grids (`GlmImageModel.get_rope_index`).

    The temporal one is constant in a grid; the next begins after its longer side.
    """
    parts = []
    for rows, cols in grids:
        row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        parts.append(torch.stack([torch.zeros(rows * cols).long(), row.flatten(), col.flatten()], dim=1) + start)
        start += max(rows, cols)
    return torch.cat(parts)
