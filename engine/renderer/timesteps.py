"""The denoising schedule of one image: which timesteps, how much noise."""

import copy

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from engine.geometry import Geometry


def schedule(scheduler: FlowMatchEulerDiscreteScheduler, geometry: Geometry, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps [steps] and sigmas [steps + 1] (the last is 0), float32, on the CPU.

    The timesteps are evenly spaced and truncated to integers; the sigmas are shifted towards noise by the square root
    of the image's size in patches (diffusers' `GlmImagePipeline`, `calculate_shift`).
    """
    config = scheduler.config
    train = config.num_train_timesteps  # type: ignore[attr-defined]
    timesteps = np.linspace(train, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    growth = (geometry.patches.tokens / config.get("base_image_seq_len", 256)) ** 0.5
    mu = growth * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
    own = copy.deepcopy(scheduler)  # it keeps the schedule as state, and images differ
    own.set_timesteps(sigmas=timesteps / train, mu=mu, timesteps=timesteps)  # type: ignore[arg-type]
    return torch.as_tensor(own.timesteps), torch.as_tensor(own.sigmas)


def partial_steps(steps: int, count: int) -> list[int]:
    """After how many of `steps` steps a picture is shown, evenly spaced: at most `count`, fewer where steps are few."""
    return sorted({steps * (number + 1) // (count + 1) for number in range(count)} - {0, steps})


def initial_noise(seed: int, channels: int, geometry: Geometry) -> Tensor:
    """[channels, H/8, W/8] float32 noise of an image, on the CPU: the same on every device and in every batch."""
    shape = (1, channels, geometry.latents.rows, geometry.latents.cols)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)[0]
