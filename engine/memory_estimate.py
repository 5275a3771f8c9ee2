"""What an engine will need, from a checkpoint's configuration and the headers of its files, before it loads any weight.

Caches take a share of what is left after loading, so they fit by themselves, unless `kv_tokens` is set by hand.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineSettings
from engine.device_memory import host_memory
from engine.errors import StartError
from engine.geometry import PATCH
from engine.observability.logs import event
from engine.renderer.stage import TICK_WIDTHS
from models.checkpoint import find_checkpoint, tensor_sizes
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.model import Stage, planner_key
from models.glm_image.vision import vision_key
from models.json_files import read_json

GB = 1e9
CUDA_BYTES = 10**9  # context, streams, graphs
SIDE = 1024  # of an image whose rendering must fit; larger ones need more
PASS_WIDTHS, PASS_TOKENS = 12, 512  # of the planner

logger = logging.getLogger("glimmer.engine")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one engine: weights by part, and what a first image of `SIDE` needs beside them."""

    weights: dict[str, int]
    work: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.work


def estimate_memory(folder: Path, stage: Stage, dtype: torch.dtype, *, kv_tokens: int, on_cuda: bool) -> MemoryEstimate:
    """Return what an engine of a stage needs.

    Raises:
        CheckpointError: files are missing or cannot be read.
    """
    encoder = folder / "vision_language_encoder"
    planner = PlannerConfig.from_json(read_json(encoder / "config.json"))
    renderer = RendererConfig.from_json(read_json(folder / "transformer" / "config.json"))
    weights, work, itemsize = dict[str, int](), CUDA_BYTES if on_cuda else 0, dtype.itemsize
    if stage != "render":
        sizes = {key: size for key, size in tensor_sizes(encoder) if planner_key(key) or vision_key(key)}
        weights["planner"] = itemsize * sum(sizes.values())
        work += kv_tokens * planner.kv_bytes_per_token(itemsize)
        work += PASS_WIDTHS * PASS_TOKENS * planner.hidden_size * itemsize
    if stage != "plan":
        for part in ("transformer", "text_encoder", "vae"):
            name = "renderer" if part == "transformer" else part
            weights[name] = itemsize * sum(size for _, size in tensor_sizes(folder / part))
        work += TICK_WIDTHS * 2 * (SIDE // PATCH) ** 2 * renderer.dim * itemsize
    return MemoryEstimate(weights, work)


def check_memory(settings: EngineSettings, model: str, device: torch.device, dtype: torch.dtype) -> None:
    """Log the estimate of an engine.

    Raises:
        StartError: it needs more than there is; names settings that would fit.
        CheckpointError: as `estimate_memory`.
    """
    folder, on_cuda = find_checkpoint(model), device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[1] if on_cuda else host_memory()

    def estimate(stage: Stage, dtype: torch.dtype, kv_tokens: int) -> MemoryEstimate:
        return estimate_memory(folder, stage, dtype, kv_tokens=kv_tokens, on_cuda=on_cuda)

    needed = estimate(settings.stage, dtype, settings.kv_tokens or 0)
    weights = {f"{name}_gb": _gb(size) for name, size in needed.weights.items()}
    rest = {"work_gb": _gb(needed.work), "available_gb": _gb(available)}
    event(logger, "memory_estimated", logging.INFO, **weights, **rest)
    if needed.total <= available:
        return

    def alternatives() -> Iterator[tuple[str, MemoryEstimate]]:
        if settings.kv_tokens:
            yield "GLIMMER_KV_TOKENS unset", estimate(settings.stage, dtype, 0)
        if dtype == torch.float32:
            yield "GLIMMER_DTYPE=bfloat16", estimate(settings.stage, torch.bfloat16, settings.kv_tokens or 0)
        if settings.stage == "all":
            for stage in ("plan", "render"):
                yield f"GLIMMER_STAGE={stage}", estimate(stage, dtype, settings.kv_tokens or 0)

    fitting = [f"{setting} ({_gb(other.total)} GB)" for setting, other in alternatives() if other.total <= available]
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in needed.weights.items())
    raise StartError(
        f"the checkpoint needs {_gb(needed.total)} GB (weights: {parts}; one image: {_gb(needed.work)}), but {device} "
        f"has {_gb(available)} GB; "
        + (f"what would fit: {', '.join(fitting)}" if fitting else "no setting makes it fit: it needs a larger device")
    )


def _gb(size: int) -> str:
    return f"{size / GB:.2f}"
