"""The renderer: a diffusion transformer from plans to latents.

    T   tokens of a packed batch      n   images in it          dim   heads * head_dim
    E   width of the time embedding   D   head dimension        P     values of a patch: channels * 2 * 2
    S   tokens of source images       g   glyph tokens

A sequence is a branch of an image, conditional or (with guidance) unconditional: glyph tokens, then patches; all are
packed into one tensor. Source images run through the layers once, without noise; the conditional branch attends to
their keys and values.

Follows diffusers' `GlmImageTransformer2DModel` and its weights.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_invariant import Linear, elementwise
from models.glm_image.config import RendererConfig
from models.glm_image.render_operations import EPS, RendererBatch, add_gated, attend, modulate, rotate

ROPE_THETA = 10000.0
LAYER_VECTORS = 6  # shift, scale and gate of attention, and of the feed-forward


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU with the tanh approximation.

    In float32 on a CPU, 0.5 (1 + tanh(u)) = sigmoid(2u) takes half of torch's time.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    twice = 2 * math.sqrt(2 / math.pi)
    return x.square().mul_(0.044715 * twice).add_(twice).mul_(x).sigmoid_().mul_(x)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu-tanh": gelu_tanh}


class GatedLinear(nn.Module):
    """A linear layer, with diffusers' name `net.0.proj`."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = Linear(dim_in, dim_out)


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, dim_in: int, inner: int, dim_out: int, activation: str):
        super().__init__()
        self.activation = activation
        self.net = nn.ModuleList([GatedLinear(dim_in, inner), nn.Identity(), Linear(inner, dim_out)])

    def forward(self, x: Tensor, tile_height: int | None = None) -> Tensor:
        x = self.net[0].proj(x, tile_height)  # type: ignore[union-attr]
        return self.net[2](elementwise(ACTIVATIONS[self.activation], x), tile_height)


class Embedder(nn.Module):
    """Linear, SiLU, linear (diffusers' `TimestepEmbedding` and `PixArtAlphaTextProjection`)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.linear_1 = Linear(dim_in, dim_out)
        self.linear_2 = Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeAndSizeEmbedding(nn.Module):
    def __init__(self, config: RendererConfig):
        super().__init__()
        self.time_dim, self.condition_dim = config.time_embed_dim, config.condition_dim
        self.timestep_embedder = Embedder(config.time_embed_dim, config.time_embed_dim)
        self.condition_embedder = Embedder(4 * config.condition_dim, config.time_embed_dim)

    def forward(self, timesteps: Tensor, height: int, width: int) -> Tensor:
        """Embed timesteps (minus one), crop corner and size in pixels: [steps, E]."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        size = torch.tensor([0.0, 0.0, height, width], device=timesteps.device)
        condition = sinusoids(size, self.condition_dim).reshape(1, -1).to(dtype)
        time = self.timestep_embedder(sinusoids(timesteps, self.time_dim).to(dtype))
        return F.silu(time + self.condition_embedder(condition))


class RendererAttention(nn.Module):
    def __init__(self, config: RendererConfig, layer_index: int):
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (Linear(config.dim, config.dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(config.dim, config.dim)])

    def forward(self, x: Tensor, batch: RendererBatch) -> Tensor:
        """Project, attend per sequence, project out: [T, dim] -> [T, dim]."""
        q, k, v = (
            project(x, batch.tile_height).unflatten(-1, (-1, self.head_dim))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (rotate(F.layer_norm(h, (self.head_dim,), eps=EPS), batch) for h in (q, k))
        if batch.kv_out is not None:
            for part, source in zip(batch.kv_out[self.layer_index], (k, v), strict=True):
                part.copy_(source[: part.shape[1]].transpose(0, 1))
        attended = attend(q, k, v, batch, self.layer_index)
        return self.to_out[0](attended, batch.tile_height)


class Modulation(nn.Module):
    """Shift, scale and gate of both halves of a layer."""

    def __init__(self, config: RendererConfig):
        super().__init__()
        self.linear = Linear(config.time_embed_dim, LAYER_VECTORS * 2 * config.dim)

    def forward(self, temb: Tensor) -> Tensor:
        """Return [rows, 6, 2, dim], for patches and for glyph tokens; scales have 1 added."""
        vectors = self.linear(temb).unflatten(-1, (LAYER_VECTORS, 2, -1))
        vectors[:, 1::3] += 1  # a list of indices would be copied to the device
        return vectors


class RendererLayer(nn.Module):
    def __init__(self, config: RendererConfig, layer_index: int):
        super().__init__()
        self.norm1 = Modulation(config)
        self.attn1 = RendererAttention(config, layer_index)
        self.ff = FeedForward(config.dim, 4 * config.dim, config.dim, "gelu-tanh")

    def forward(self, x: Tensor, vectors: Tensor, batch: RendererBatch) -> Tensor:
        """Modulate, attend, modulate, feed forward: [T, dim] -> [T, dim], in place.

        Args:
            vectors: [6, 2n, dim] of `Modulation`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = add_gated(x, self.attn1(modulate(x, scale1, shift1, batch), batch), gate1, batch)
        return add_gated(x, self.ff(modulate(x, scale2, shift2, batch), batch.tile_height), gate2, batch)


class OutputNorm(nn.Module):
    """The last adaptive layer norm: scale before shift."""

    def __init__(self, config: RendererConfig):
        super().__init__()
        self.linear = Linear(config.time_embed_dim, 2 * config.dim)

    def forward(self, temb: Tensor) -> Tensor:
        """Return [rows, 2, 1, dim]; the scale has 1 added."""
        vectors = self.linear(temb).unflatten(-1, (2, 1, -1))
        vectors[:, 0] += 1
        return vectors


class PatchProjector(nn.Module):
    def __init__(self, config: RendererConfig):
        super().__init__()
        self.proj = Linear(config.patch_dim, config.dim)


class Renderer(nn.Module):
    """Predicts the velocity of every patch of a packed batch."""

    def __init__(self, config: RendererConfig):
        super().__init__()
        self.config = config
        self.image_projector = PatchProjector(config)
        self.glyph_projector = FeedForward(config.text_embed_dim, config.dim, config.dim, "gelu")
        self.prior_token_embedding = nn.Embedding(config.prior_vq_quantizer_codebook_size, config.dim)
        self.prior_projector = FeedForward(config.dim, config.dim, config.dim, "silu")
        self.time_condition_embed = TimeAndSizeEmbedding(config)
        self.transformer_blocks = nn.ModuleList(RendererLayer(config, index) for index in range(config.num_layers))
        self.norm_out = OutputNorm(config)
        self.proj_out = Linear(config.dim, config.patch_dim)

    # Computed once for all steps of an image.

    def glyphs(self, embeddings: Tensor) -> Tensor:
        """Project glyph embeddings to [g, dim]."""
        return self.glyph_projector(embeddings)

    def plan(self, codes: Tensor) -> Tensor:
        """Embed a plan [rows, cols] as [4 * rows * cols, dim], one per patch (2x nearest)."""
        vectors = self.prior_projector(self.prior_token_embedding(codes.flatten()))
        grid = vectors.unflatten(0, codes.shape)
        return grid.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 1)

    def no_plan(self) -> Tensor:
        """Return the unconditional plan [1, dim]: zeros BEFORE the projector."""
        return self.prior_projector(torch.zeros_like(self.prior_token_embedding.weight[:1]))

    def time_embeddings(self, timesteps: Tensor, height: int, width: int) -> Tensor:
        """Embed the scheduler's timesteps: [steps, E]."""
        return self.time_condition_embed(timesteps - 1, height, width)

    def modulations(self, temb: Tensor) -> Tensor:
        """Return what all norms and gates apply at time embeddings [rows, E]: [rows, M, 2, dim].

        The M vectors are 6 of every layer (`Modulation`), then scale and shift of the last norm; each for patches and
        for glyph tokens.
        """
        layers = [cast(RendererLayer, layer) for layer in self.transformer_blocks]
        shape = (len(temb), LAYER_VECTORS * len(layers) + 2, 2, self.config.dim)
        vectors = temb.new_empty(shape)
        for layer, part in zip(layers, vectors[:, :-2].split(LAYER_VECTORS, dim=1), strict=True):
            part.copy_(layer.norm1(temb))
        vectors[:, -2:] = self.norm_out(temb)
        return vectors

    # Computed for every step, over a batch.

    def patches(self, latents: Tensor, tile_height: int | None = None) -> Tensor:
        """Project latent patches [tokens, P] to [tokens, dim]."""
        return self.image_projector.proj(latents, tile_height)

    def forward(self, x: Tensor, modulations: Tensor, batch: RendererBatch) -> Tensor:
        """Predict velocities [T, P], meaningless on glyph tokens and padding. Overwrites x.

        Args:
            x: [T, dim] glyph tokens, and patches with the plan added.
            modulations: [M, 2n, dim] of `stack_modulations`.
        """
        for layer, vectors in self._layers(modulations):
            x = layer(x, vectors, batch)
        scale, shift = modulations[-2:]
        return self.proj_out(modulate(x, scale, shift, batch), batch.tile_height)

    # Computed once for every source image.

    def source_time_embedding(self, height: int, width: int) -> Tensor:
        """Return [1, E] of timestep 0: a source has no noise."""
        return self.time_condition_embed(torch.zeros(1, device=self.proj_out.weight.device), height, width)

    def read_source(self, x: Tensor, modulations: Tensor, batch: RendererBatch) -> Generator[int]:
        """Fill `batch.kv_out`; yield the layers done. Overwrites x.

        Args:
            x: one sequence of patches.
        """
        for number, (layer, vectors) in enumerate(self._layers(modulations), 1):
            x = layer(x, vectors, batch)
            yield number

    def _layers(self, modulations: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Return every layer and its vectors."""
        return zip(self.transformer_blocks, modulations[:-2].split(LAYER_VECTORS), strict=True)


def stack_modulations(vectors: Iterable[Tensor]) -> Tensor:
    """Stack the modulations [M, 2, dim] of n images: [M, 2n, dim]."""
    return torch.stack(tuple(vectors), dim=1).flatten(1, 2)


def rotary_angles(rows: int, cols: int, head_dim: int) -> Tensor:
    """Return [rows * cols, D]: a quarter rotates by row, a quarter by column; the second half repeats them."""
    half = head_dim // 2
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float32)[: half // 2] / half)
    by_row = torch.outer(torch.arange(rows).float(), frequency)[:, None].expand(rows, cols, -1)
    by_col = torch.outer(torch.arange(cols).float(), frequency)[None].expand(rows, cols, -1)
    angles = torch.cat([by_row, by_col], dim=-1)
    return torch.cat([angles, angles], dim=-1).flatten(0, 1)


def sinusoids(x: Tensor, dim: int) -> Tensor:
    """Return cosines, then sines, [k, dim] float32 of x [k]."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=x.device) / (dim // 2))
    angle = x.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def patchify(latents: Tensor, patch: int = 2) -> Tensor:
    """Cut latents [C, h, w] into patches [tokens, P]."""
    channels, height, width = latents.shape
    grid = latents.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def unpatchify(tokens: Tensor, rows: int, cols: int, patch: int = 2) -> Tensor:
    """Invert `patchify`."""
    grid = tokens.reshape(rows, cols, -1, patch, patch)
    return grid.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch, cols * patch)
