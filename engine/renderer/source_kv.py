"""What the images of an edit see of its sources: their keys and values in every layer.

They are read once for a request, when its first image is about to be rendered, shared by all its images, and kept until
the request ends. How many may be kept at once is decided at admission (`EngineLimits.source_patches`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.request import Request
from models.batch_invariant import elementwise, padded
from models.glm_image.model import GlmImage
from models.glm_image.renderer import RowLayout, patchify, rotary_angles
from models.glm_image.source_images import CODE_CELL, EncodedImage


class SourceKVCache:
    """Keys and values [layers, 2, heads, S, D] of the requests that have sources.

    Args:
        block, modulation_block: rows per matrix product, see `models.batch_invariant`.
    """

    def __init__(self, model: GlmImage, block: int | None, modulation_block: int | None):
        self._renderer, self._device, self._dtype = model.renderer, model.device, model.dtype
        self._block, self._modulation_block = block, modulation_block
        self._kept: dict[Request, Tensor] = {}

    def __len__(self) -> int:
        """Requests whose keys and values are kept."""
        return len(self._kept)

    @torch.inference_mode()
    def of(self, request: Request) -> Tensor | None:
        """The request's, in the order of its sources; None if it has none."""
        if request.encoded and request not in self._kept:
            self._kept[request] = self._read(request.encoded)
        return self._kept.get(request)

    def release(self, request: Request) -> None:
        """The request has ended; harmless if it had no sources."""
        self._kept.pop(request, None)

    def _read(self, sources: list[EncodedImage]) -> Tensor:
        config, patches = self._renderer.config, [source.patches for source in sources]
        shape = (config.num_layers, 2, config.num_attention_heads, sum(patches), config.attention_head_dim)
        kept = torch.empty(shape, dtype=self._dtype, device=self._device)
        for source, keep in zip(sources, kept.split(patches, dim=3), strict=True):
            self._read_one(source, keep)
        return kept

    def _read_one(self, source: EncodedImage, keep: Tensor) -> None:
        """Every source on its own: what it leaves depends on no other, and its positions start anew."""
        renderer, (rows, cols), patches = self._renderer, source.codes.shape, source.patches
        latents = patchify(source.latents, renderer.config.patch_size).to(self._dtype)
        padding = padded(patches, self._block) - patches
        projected = renderer.patches(F.pad(latents, (0, 0, 0, padding)), self._block)
        x = torch.zeros_like(projected)
        x[:patches] = projected[:patches] + renderer.plan(source.codes)
        temb = renderer.source_time_embedding(CODE_CELL * rows, CODE_CELL * cols)
        temb = F.pad(temb, (0, 0, 0, padded(1, self._modulation_block) - 1))
        renderer.read_source(x, temb, self._layout(rows, cols, padding), keep, self._block, self._modulation_block)

    def _layout(self, rows: int, cols: int, padding: int) -> RowLayout:
        """One row of 2 x 2 patches a code, and no glyph tokens."""
        angles = F.pad(rotary_angles(2 * rows, 2 * cols, self._renderer.config.attention_head_dim), (0, 0, 0, padding))
        cos, sin = (elementwise(function, angles).to(self._device) for function in (torch.cos, torch.sin))
        modulation = torch.zeros(len(angles), dtype=torch.long, device=self._device)
        return RowLayout([4 * rows * cols], modulation, cos, sin)
