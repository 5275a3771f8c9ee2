import os
from dataclasses import dataclass

import torch

from engine.cores import engines_of_machine
from engine.device_memory import host_memory
from engine.geometry import CELL, MAX_ASPECT, MAX_IMAGES, MAX_SIDE, MAX_SOURCES, PATCH, Geometry
from models.glm_image.model import GlmImage

BLOCK_SIZE = 32  # tokens
CPU_PREFILL_TOKENS, CUDA_PREFILL_TOKENS = 2048, 512  # the arithmetic of about 3 decode passes on an H100
CPU_KV_BYTES, CPU_KV_SHARE = 1 << 30, 0.15  # of `host_memory`, divided by the engines there
CPU_SOURCE_BYTES, CPU_SOURCE_SHARE = 2 << 30, 0.2
CUDA_KV_SHARE = 0.4  # of memory free after loading
CUDA_KV_SHARE_ALONE = 0.8  # without a renderer
CUDA_SOURCE_SHARE = 0.25
PLANNED_SOURCE_PATCHES = 2 * MAX_SOURCES * (MAX_SIDE // PATCH) ** 2  # without a renderer: pixels of two largest edits


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of all that takes engine memory.

    Args:
        max_images: in flight.
        max_prompt_tokens: without the codes of source images.
        render_token_budget: packed tokens of a tick.
        source_patches: of edits, with keys and values.
        prefill_tokens: of a planner step, and of a chunk of a prompt.
        min_planner_rows: of a planner pass on a GPU; None: as many as `max_sequences` need.
    """

    max_images: int
    max_prompt_tokens: int
    kv_tokens: int
    render_token_budget: int
    source_patches: int
    block_size: int = BLOCK_SIZE
    prefill_tokens: int = CPU_PREFILL_TOKENS
    min_planner_rows: int | None = None

    @property
    def max_sequences(self) -> int:
        """Bound the plans in flight; an idle engine must fit any request."""
        return max(self.max_images, MAX_IMAGES)

    @property
    def blocks(self) -> int:
        return self.kv_tokens // self.block_size

    @property
    def source_tokens(self) -> int:
        """Convert `source_patches` to prompt tokens."""
        return self.source_patches // (CELL // PATCH) ** 2

    @property
    def max_plan_tokens(self) -> int:
        return Geometry(MAX_SIDE, MAX_SIDE).plan_tokens

    @property
    def max_sequence_blocks(self) -> int:
        """Bound the blocks of a prompt, with codes of sources, and its plan."""
        tokens = self.max_prompt_tokens + self.source_tokens + self.max_plan_tokens
        return min(self.blocks, -(-tokens // self.block_size))

    @property
    def max_positions(self) -> int:
        """Bound the positions: the prompt, then longer sides of sources, preview and plan."""
        longest_preview = Geometry(MAX_SIDE, MAX_SIDE // MAX_ASPECT).preview.cols
        return self.max_prompt_tokens + MAX_SOURCES * (MAX_SIDE // CELL) + longest_preview + MAX_SIDE // CELL + 1

    @classmethod
    def choose(
        cls,
        model: GlmImage,
        *,
        max_images: int | None = None,
        max_prompt_tokens: int = 2048,
        kv_tokens: int | None = None,
        render_token_budget: int | None = None,
        source_patches: int | None = None,
        min_planner_rows: int | None = None,
    ) -> "EngineLimits":
        """Return the limits; those not given suit the device and the stages of the model."""
        on_cuda = model.device.type == "cuda"
        images = max_images or (32 if on_cuda else 16)
        needed = images * (Geometry(MAX_SIDE, MAX_SIDE).plan_tokens + max_prompt_tokens)
        return cls(
            max_images=images,
            max_prompt_tokens=max_prompt_tokens,
            kv_tokens=kv_tokens or min(needed, _affordable_kv_tokens(model)),
            render_token_budget=render_token_budget or (16384 if on_cuda else 2048),
            source_patches=source_patches or _affordable_source_patches(model),
            prefill_tokens=CUDA_PREFILL_TOKENS if on_cuda else CPU_PREFILL_TOKENS,
            min_planner_rows=min_planner_rows,
        )


def _affordable_kv_tokens(model: GlmImage) -> int:
    if model.stage == "render":
        return 0
    cuda_share = CUDA_KV_SHARE_ALONE if model.stage == "plan" else CUDA_KV_SHARE
    available = _available_bytes(model, cuda_share, CPU_KV_SHARE, CPU_KV_BYTES)
    return available // model.planner.config.kv_bytes_per_token(model.dtype.itemsize)


def _affordable_source_patches(model: GlmImage) -> int:
    if model.stage == "plan":
        return PLANNED_SOURCE_PATCHES
    available = _available_bytes(model, CUDA_SOURCE_SHARE, CPU_SOURCE_SHARE, CPU_SOURCE_BYTES)
    return available // model.renderer.config.kv_bytes_per_token(model.dtype.itemsize)


def _available_bytes(model: GlmImage, cuda_share: float, cpu_share: float, cpu_bytes: int) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] * cuda_share)
    return min(cpu_bytes, int(host_memory() * cpu_share / engines_of_machine(os.environ)))
