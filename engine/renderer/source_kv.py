"""Keys and values of source images, shared by a request's images."""

from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.geometry import CELL
from engine.renderer.modulations import padded_modulations
from engine.request import Request
from models.batch_invariant import elementwise, padded
from models.glm_image.model import GlmImage
from models.glm_image.render_operations import RendererBatch
from models.glm_image.renderer import patchify, rotary_angles, stack_modulations
from models.glm_image.source_images import EncodedImage


class SourceKVCache:
    """Holds source keys and values [layers, 2, heads, S, D] by request; `EngineLimits.source_patches` bounds them."""

    def __init__(self, model: GlmImage, tile_height: int | None):
        self._renderer, self._device, self._dtype = model.renderer, model.device, model.dtype
        self._tile_height = tile_height
        self._by_request: dict[Request, Tensor] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def of(self, request: Request) -> Tensor | None:
        """Return a request's keys and values in source order, computed on first use; None without sources."""
        for _ in self.compute(request):
            pass
        return self._by_request.get(request)

    @torch.inference_mode()
    def compute(self, request: Request) -> Generator[bool]:
        """Compute keys and values; yield after every layer whether a source image is complete."""
        if not request.encoded or request in self._by_request:
            return
        config, patches = self._renderer.config, [source.patches for source in request.encoded]
        shape = (config.num_layers, 2, config.num_attention_heads, sum(patches), config.attention_head_dim)
        source_kv = torch.empty(shape, dtype=self._dtype, device=self._device)
        for source, kv_out in zip(request.encoded, source_kv.split(patches, dim=3), strict=True):
            for layer in self._read(source, kv_out):
                yield layer == config.num_layers
        self._by_request[request] = source_kv

    def release(self, request: Request) -> None:
        """Free a request's keys and values."""
        self._by_request.pop(request, None)

    def _read(self, source: EncodedImage, kv_out: Tensor) -> Generator[int]:
        """Fill `kv_out`; yield the layers done. Every source's positions start at 0."""
        renderer, (rows, cols), patches = self._renderer, source.codes.shape, source.patches
        latents = patchify(source.latents, renderer.config.patch_size).to(self._dtype)
        padding = padded(patches, self._tile_height) - patches
        projected = renderer.patches(F.pad(latents, (0, 0, 0, padding)), self._tile_height)
        x = torch.zeros_like(projected)
        x[:patches] = projected[:patches] + renderer.plan(source.codes)
        temb = renderer.source_time_embedding(CELL * rows, CELL * cols)
        modulations = stack_modulations([padded_modulations(renderer, temb)[0]])
        yield from renderer.read_source(x, modulations, self._batch(rows, cols, padding, kv_out))

    def _batch(self, rows: int, cols: int, padding: int, kv_out: Tensor) -> RendererBatch:
        angles = F.pad(rotary_angles(2 * rows, 2 * cols, self._renderer.config.attention_head_dim), (0, 0, 0, padding))
        cos, sin = (elementwise(function, angles).to(self._device) for function in (torch.cos, torch.sin))
        modulation_index = torch.zeros(len(angles), dtype=torch.long, device=self._device)
        return RendererBatch(
            [4 * rows * cols],
            modulation_index,
            cos,
            sin,
            tile_height=self._tile_height,
            kv_out=kv_out,
        )
