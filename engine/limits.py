"""How much an engine takes on at once, from its settings, its model and its device."""

from dataclasses import dataclass

import torch

from engine.geometry import MAX_SIDE, Geometry
from models.glm_image.model import GlmImage

MAX_IMAGES_PER_REQUEST = 10
BLOCK_SIZE = 32  # tokens of a block of the key/value cache
CPU_KV_BYTES = 1 << 30
CUDA_KV_SHARE = 0.4  # of the memory that is free once the weights are loaded


@dataclass(frozen=True)
class EngineLimits:
    """
    Args:
        max_images: images in flight, planning or rendering.
        max_prompt_tokens: a longer prompt is refused.
        kv_tokens: tokens the key/value cache holds.
        render_token_budget: packed tokens of a renderer tick.
    """

    max_images: int
    max_prompt_tokens: int
    kv_tokens: int
    render_token_budget: int
    block_size: int = BLOCK_SIZE

    @property
    def slots(self) -> int:
        """Plans under way at once; any request that the API accepts has to fit an idle engine."""
        return max(self.max_images, MAX_IMAGES_PER_REQUEST)

    @property
    def blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def max_plan_tokens(self) -> int:
        return Geometry(MAX_SIDE, MAX_SIDE).plan_tokens

    @property
    def max_positions(self) -> int:
        """Positions a plan can reach: the prompt, the longer side of the preview, then that of the plan."""
        return self.max_prompt_tokens + 32 + MAX_SIDE // 32 + 1

    @classmethod
    def choose(
        cls,
        model: GlmImage,
        *,
        max_images: int | None = None,
        max_prompt_tokens: int = 2048,
        kv_tokens: int | None = None,
        render_token_budget: int | None = None,
    ) -> "EngineLimits":
        """The limits given, and for those left out what suits the device."""
        on_cuda = model.device.type == "cuda"
        images = max_images or (32 if on_cuda else 16)
        enough = images * (Geometry(MAX_SIDE, MAX_SIDE).plan_tokens + max_prompt_tokens)
        return cls(
            max_images=images,
            max_prompt_tokens=max_prompt_tokens,
            kv_tokens=kv_tokens or min(enough, _affordable_kv_tokens(model)),
            render_token_budget=render_token_budget or (16384 if on_cuda else 2048),
        )


def _affordable_kv_tokens(model: GlmImage) -> int:
    if model.device.type == "cuda":
        available = int(torch.cuda.mem_get_info(model.device)[0] * CUDA_KV_SHARE)
    else:
        available = CPU_KV_BYTES
    return available // model.planner.config.kv_bytes_per_token(model.dtype.itemsize)
