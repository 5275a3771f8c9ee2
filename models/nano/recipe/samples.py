"""Last training of the decoder: on latents that the renderer makes.

On true latents alone it draws some letters wrong (an H for an M).
"""

from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.nano.recipe import autoencoder, world
from models.nano.recipe.batches import Batch, glyph_strings, per_token
from models.nano.recipe.layouts import random_poster
from models.nano.recipe.loop import Losses, autocast, device, train
from models.nano.recipe.renderer import TrainedRenderer
from models.nano.recipe.world import CELL, Poster

PER_SHARD = 24
STEPS, GUIDANCE = 12, 2.5  # defaults of a request
TRUE_SHARE = 0.2  # of steps on true latents, so that the decoder does not unlearn them

Size = tuple[int, int]


@cache
def posters_of(size: Size, index: int) -> list[Poster]:
    rng = Random(f"samples-{size[0]}x{size[1]}-{index}")
    return [random_poster(rng) for _ in range(PER_SHARD)]


def make_shard(model: TrainedRenderer, folder: Path, size: Size, index: int, mean: Tensor, std: Tensor) -> None:
    """Render one shard's posters unless its file exists."""
    path = _path(folder, size, index)
    if not path.exists():
        normalised = render(model, posters_of(size, index), *size, seed=index)
        latents = (normalised.cpu() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).to(torch.bfloat16)
        partial = path.with_suffix(".partial")
        torch.save({"latents": latents}, partial)
        partial.replace(path)


@torch.no_grad()
def render(model: TrainedRenderer, posters: list[Poster], width: int, height: int, seed: int) -> Tensor:
    """Return normalised latents [b, c, h, w] of true plans."""
    rng, count = Random(seed), len(posters)
    plans = np.stack([per_token(world.plan(p, height // CELL, width // CELL)) for p in posters])
    codes, strings = torch.from_numpy(plans).to(device()), [glyph_strings(p, rng) for p in posters]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, autoencoder.CONFIG["latent_channels"], height // 8, width // 8, generator=generator)
    x, sigmas = x.to(device()), _sigmas(height // 16 * (width // 16))

    def velocity(sigma: float, conditioned: bool) -> Tensor:
        texts = strings if conditioned else [[] for _ in posters]
        mask = torch.full((count,), float(conditioned), device=device())
        batch = Batch(x, codes, x[:, :1], texts, (height, width), mask)
        with autocast():
            return model(batch, x, torch.full((count,), sigma, device=device()))[0]

    for sigma, following in pairwise(sigmas):
        conditional, unconditional = velocity(sigma, True), velocity(sigma, False)
        x = x + (following - sigma) * (unconditional + GUIDANCE * (conditional - unconditional))
    return x


def _sigmas(patches: int) -> list[float]:
    """Return the pipeline's schedule (diffusers' `calculate_shift`)."""
    even = np.linspace(1000, 1, STEPS + 1)[:-1] / 1000
    shift = 0.75 * (patches / 256) ** 0.5 + 0.25
    return [*(shift / (shift + 1 / even - 1)).tolist(), 0.0]


def train_decoder(model: AutoencoderKL, folder: Path, shards: dict[Size, int], steps: int) -> AutoencoderKL:
    """Continue the training of a decoder."""
    model.encoder.requires_grad_(False)
    rendered = {
        (size, index): torch.load(_path(folder, size, index))["latents"]
        for size, count in shards.items()
        for index in range(count)
    }

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        key = rng.choice(list(rendered))
        (width, height), i = key[0], rng.randrange(PER_SHARD)
        poster = posters_of(*key)[i]
        pixels = autoencoder.pixels_of([world.draw(poster, width, height)])
        is_true = rng.random() < TRUE_SHARE
        with autocast():
            with torch.no_grad():
                latents = autoencoder.latents_of(model, pixels) if is_true else rendered[key][i][None].to(device())
            decoded = autoencoder.decode(model, latents.float())
        weights = autoencoder.line_weights(poster, width, height)
        loss, square = autoencoder.reconstruction_loss(decoded, pixels, weights)
        return loss, {"true" if is_true else "made": autoencoder.psnr(square)}

    train("autoencoder-samples", model, loss_of, folder, steps=steps, learning_rate=5e-4)
    return model


def _path(folder: Path, size: Size, index: int) -> Path:
    return folder / f"samples-{size[0]}x{size[1]}-{index}.pt"
