import copy

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from engine.geometry import Geometry


def schedule(scheduler: FlowMatchEulerDiscreteScheduler, geometry: Geometry, steps: int) -> tuple[Tensor, Tensor]:
    """Return timesteps [steps] and sigmas [steps + 1] (the last is 0), float32, on the CPU.

    Timesteps are evenly spaced integers; sigmas are shifted towards noise by the square root of the image's patches
    (diffusers' `GlmImagePipeline`, `calculate_shift`).
    """
    config = scheduler.config
    train = config.num_train_timesteps  # type: ignore[attr-defined]
    timesteps = np.linspace(train, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    growth = (geometry.patches.tokens / config.get("base_image_seq_len", 256)) ** 0.5
    mu = growth * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
    scheduler = copy.deepcopy(scheduler)  # it keeps the schedule as state
    scheduler.set_timesteps(sigmas=timesteps / train, mu=mu, timesteps=timesteps)  # type: ignore[arg-type]
    return torch.as_tensor(scheduler.timesteps), torch.as_tensor(scheduler.sigmas)


def partial_steps(steps: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced steps with a partial image."""
    return sorted({steps * (index + 1) // (count + 1) for index in range(count)} - {0, steps})


def initial_noise(seed: int, channels: int, geometry: Geometry) -> Tensor:
    """Return noise [channels, H/8, W/8] float32, drawn on the CPU: the same on every device."""
    shape = (1, channels, geometry.latents.rows, geometry.latents.cols)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)[0]
