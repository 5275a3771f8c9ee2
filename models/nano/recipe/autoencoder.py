"""Training of the autoencoder: 8x8 pixels to 8 latent channels and back.

First on crops, which is quick; then the decoder alone on whole posters, which its group norms cover: else their colours
shift. The fixed latents get a little noise, as if from the renderer.
"""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.nano.recipe import codes, world
from models.nano.recipe.layouts import random_poster
from models.nano.recipe.loop import Losses, autocast, device, train
from models.nano.recipe.world import Poster

CONFIG = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32, 64, 96), "latent_channels": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 8,
    "sample_size": 256, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}  # fmt: skip
CROP = 64
SCALE_WEIGHT = 1e-4
LATENT_NOISE = 0.03  # share of their standard deviation
LINE_WEIGHT = 4.0
SIZES = ((256, 256), (256, 256), (384, 256), (256, 384), (512, 512))


def pixels_of(images: list[np.ndarray]) -> Tensor:
    """Return pixels [b, 3, h, w] in -1..1 of uint8 images of one size."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.to(device()).contiguous(memory_format=torch.channels_last)


def random_crop(rng: Random, side: int = CROP) -> np.ndarray:
    """Return a square of a poster on the 16-pixel grid, preferably not a plain one."""
    width, height = rng.choice(SIZES)
    image = world.draw(random_poster(rng), width, height)
    best = image[:side, :side]
    for _ in range(3):
        y, x = (rng.randrange((n - side) // 16 + 1) * 16 for n in (height, width))
        best = image[y : y + side, x : x + side]
        if best.std((0, 1)).sum() > 10:
            break
    return best


def reconstruction_loss(decoded: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the loss (L1, squared error, L1 of gradients) and the unweighted squared error."""
    error = decoded.float() - target
    weighted = error * weight
    across, down = weighted[..., 1:] - weighted[..., :-1], weighted[..., 1:, :] - weighted[..., :-1, :]
    loss = weighted.abs().mean() + 2 * (weighted * error).mean() + 0.5 * (across.abs().mean() + down.abs().mean())
    return loss, error.square().mean()


def make() -> AutoencoderKL:
    torch.manual_seed(0)
    model: Any = AutoencoderKL(**CONFIG)
    return model.to(device(), memory_format=torch.channels_last)


def latents_of(model: Any, pixels: Tensor) -> Tensor:
    """Return latents [b, 8, h / 8, w / 8] float32, not normalised."""
    return model.encode(pixels).latent_dist.mean.float()


def decode(model: Any, latents: Tensor) -> Tensor:
    """Return pixels [b, 3, h, w] in -1..1."""
    return model.decode(latents).sample


def train_on_crops(folder: Path, steps: int) -> AutoencoderKL:
    model = make()

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        pixels = pixels_of([random_crop(rng) for _ in range(16)])
        with autocast():
            mean = latents_of(model, pixels)
            decoded = decode(model, mean + torch.randn_like(mean) * mean.std() * LATENT_NOISE)
        loss, square = reconstruction_loss(decoded, pixels)
        # The mean, as in the renderer, not a sample; the penalty keeps its scale near 1.
        return loss + SCALE_WEIGHT * mean.square().mean(), {"psnr": psnr(square), "scale": mean.std().item()}

    train("autoencoder-crops", model, loss_of, folder, steps=steps, learning_rate=1e-3)
    return model


def line_weights(poster: Poster, width: int, height: int) -> Tensor:
    """Return pixel weights [1, 1, height, width], larger on letters."""
    plan = world.plan(poster, height // world.CELL, width // world.CELL)
    weight = np.where(codes.is_text(plan), LINE_WEIGHT, 1.0).astype(np.float32)
    return torch.from_numpy(weight.repeat(world.CELL, 0).repeat(world.CELL, 1))[None, None].to(device())


def train_decoder(model: AutoencoderKL, folder: Path, steps: int) -> AutoencoderKL:
    model.encoder.requires_grad_(False)

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        width, height = rng.choice(((256, 256),) * 6 + ((384, 256), (256, 384), (512, 512)))
        poster = random_poster(rng)
        pixels = pixels_of([world.draw(poster, width, height)])
        with autocast():
            with torch.no_grad():
                mean = latents_of(model, pixels)
            decoded = decode(model, mean + torch.randn_like(mean) * mean.std() * LATENT_NOISE)
        loss, square = reconstruction_loss(decoded, pixels, line_weights(poster, width, height))
        return loss, {"psnr": psnr(square)}

    train("autoencoder-decoder", model, loss_of, folder, steps=steps, learning_rate=8e-4)
    return model


def psnr(square: Tensor) -> float:
    """Return the PSNR in dB of pixels in -1..1."""
    return float(10 * torch.log10(4 / square.detach()))
