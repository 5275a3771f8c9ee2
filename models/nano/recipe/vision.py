"""Training of the vision tokenizer: from an image to the codes of its cells, for edits.

A classifier of cells. It picks the codebook vector with the largest cosine, so cross entropy on scaled cosines trains
it, and no code falls out of use.
"""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GlmImageForConditionalGeneration

from models.nano.recipe import codes, world
from models.nano.recipe.factored import FactoredTable, code_factors
from models.nano.recipe.layouts import random_poster
from models.nano.recipe.loop import Losses, autocast, device, train

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SHARPNESS = 20.0  # factor of the cosines
SIZES = ((256, 256), (256, 256), (384, 256), (256, 384), (512, 512))


class TrainedTokenizer(nn.Module):
    """The published parameters, for a batch of images of one size."""

    def __init__(self, model: GlmImageForConditionalGeneration):
        super().__init__()
        self.visual: Any = model.model.visual
        self.quantizer: Any = model.model.vqmodel
        dim = self.quantizer.quantize.embedding.weight.shape[1]
        self.requires_grad_(True)
        self.quantizer.quantize.embedding = nn.Identity()
        self.codebook = FactoredTable(code_factors(), dim, 1.0, 0.3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return cosines [b, rows * columns, codebook] of normalised pixels [b, 3, rows * 16, columns * 16]."""
        visual = self.visual
        x = visual.patch_embed.proj(pixels)
        b, dim, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2) + self._positions(rows, columns)
        for block in visual.blocks:
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).view(b, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, dim)
            x = x + block.attn.proj(attended)
            x = x + block.mlp(block.norm2(x))
        convolution = self.quantizer.quant_conv
        features = x @ convolution.weight.flatten(1).T + convolution.bias
        return F.normalize(features.float(), dim=-1) @ F.normalize(self.codebook(), dim=-1).T

    def _positions(self, rows: int, columns: int) -> Tensor:
        table = self.visual.embeddings.position_embedding.weight
        side = int(len(table) ** 0.5)
        y, x = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(table.device)
        square = table.view(side, side, -1).permute(2, 0, 1)[None]
        embeddings = F.grid_sample(square, grid, mode="bilinear", align_corners=False, padding_mode="border")
        return embeddings.flatten(2).transpose(1, 2)


def half_size(image: np.ndarray, rng: Random) -> np.ndarray:
    """Shrink as the processor does; shift colours as rendering may."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    shift = np.array([rng.gauss(0, 5) for _ in range(3)], np.float32)
    return np.clip(np.asarray(small, np.float32) + shift, 0, 255)


def train_vision(model: GlmImageForConditionalGeneration, folder: Path, steps: int) -> TrainedTokenizer:
    torch.manual_seed(0)
    tokenizer = TrainedTokenizer(model).to(device())

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        width, height = rng.choice(SIZES)
        rows, columns = height // world.CELL, width // world.CELL
        posters = [random_poster(rng) for _ in range(1024 // (rows * columns))]
        images = np.stack([half_size(world.draw(p, width, height), rng) for p in posters])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        pixels = ((pixels + torch.randn_like(pixels) * 0.015 - MEAN) / STD).to(device())
        plans = [world.plan(poster, rows, columns, from_pixels=world.ZONES) for poster in posters]
        targets = torch.from_numpy(np.stack(plans)).flatten(1).to(device())
        with autocast():
            cosines = tokenizer(pixels)
        busy = targets >= codes.PIXEL_TEXT
        chosen = busy | (torch.rand(targets.shape, device=device()) < 0.25)
        loss = F.cross_entropy(cosines[chosen].float() * SHARPNESS, targets[chosen])
        right = cosines.argmax(-1) == targets
        figures = {"loss": loss.item(), "plain": right[~busy].float().mean().item()}
        return loss, figures | ({"busy": right[busy].float().mean().item()} if busy.any() else {})

    train("vision", tokenizer, loss_of, folder, steps=steps, learning_rate=1e-3)
    return tokenizer
