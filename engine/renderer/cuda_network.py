"""Choose what runs ticks on a GPU."""

import logging
import time

import torch
from torch import Tensor

from engine.observability.fallbacks import log_fallbacks
from engine.observability.logs import event
from models.glm_image.cuda_attention import WARMED_PATCHES, choose_attention, warm_attention
from models.glm_image.fused_renderer import FusedRenderer
from models.glm_image.kernels.render_check import choose_render_kernels
from models.glm_image.renderer import Renderer, RendererBatch

logger = logging.getLogger("glimmer.engine")


class CudaNetwork:
    """A renderer with what passes its checks; `fallbacks` says why the rest does not."""

    def __init__(self, model: Renderer):
        config, dtype, device = model.config, model.proj_out.weight.dtype, model.proj_out.weight.device
        self._sizes = config.num_attention_heads, config.attention_head_dim, dtype, device
        kernels = choose_render_kernels(config, dtype, device)
        self._attend, failures = choose_attention(*self._sizes)
        self._is_warm = False
        self._fused = FusedRenderer(model, kernels, self._attend)
        self.fallbacks = kernels.failures | failures
        log_fallbacks(self.fallbacks)

    def forward(self, x: Tensor, modulations: Tensor, batch: RendererBatch) -> Tensor:
        """Predict velocities as `Renderer.forward`. Overwrites x."""
        return self._fused(x, modulations, batch)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Plan attention in the usual sizes, once, in the thread that renders."""
        if self._is_warm:
            return
        self._is_warm, started = True, time.monotonic()
        warm_attention(self._attend, *self._sizes)
        patches = ",".join(map(str, WARMED_PATCHES))
        event(logger, "attention_warmed", patches=patches, seconds=time.monotonic() - started)
