"""Random checkpoints and engines for tests."""

from pathlib import Path

import torch

from engine.engine import Engine
from engine.limits import EngineLimits
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import write_random_checkpoint

SMALL_PLANNER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}
SMALL_RENDERER = {"num_layers": 3, "attention_head_dim": 16}
VARIANTS = {
    "plain": ({}, {}),
    "one-kv-head": ({"num_key_value_heads": 1}, {}),
    "five-layers": ({"num_hidden_layers": 5}, {}),
    "head-dim-24": ({}, {"attention_head_dim": 24}),
}


def write_variant(folder: Path, variant: str) -> None:
    """Write a checkpoint smaller than the default one; `variant` is a key of `VARIANTS`."""
    planner, renderer = VARIANTS[variant]
    write_random_checkpoint(folder, planner=SMALL_PLANNER | planner, renderer=SMALL_RENDERER | renderer)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> GlmImage:
    return GlmImage.load(str(folder), torch.device("cpu"), dtype)


def small_engine(model: GlmImage, **limits: int) -> Engine:
    """Return an engine with room for 16 images; `limits` override."""
    return Engine(model, EngineLimits.choose(model, **limits))
