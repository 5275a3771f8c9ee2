"""The renderer with few, large operations, for batches on a GPU.

Query, key and value projections are one product; norms with modulation, gates with residuals and rotation are
kernels, or the same arithmetic in torch.
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from models.glm_image.cuda_attention import AttentionLayout, PackedAttention
from models.glm_image.joined_weights import JoinedLayer
from models.glm_image.kernels.render_check import RenderKernels
from models.glm_image.renderer import LAYER_VECTORS, Renderer, RendererBatch, RendererLayer


class FusedRenderer:
    """Shares the weights of a `Renderer`, whose projections become views of joined ones."""

    def __init__(self, model: Renderer, kernels: RenderKernels, attend: PackedAttention):
        self._model, self._kernels, self._attend = model, kernels, attend
        self._heads, self._head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        self._layers = [JoinedLayer.of(cast(RendererLayer, layer)) for layer in model.transformer_blocks]
        self._last: tuple[RendererBatch, AttentionLayout, Tensor] | None = None

    def __call__(self, x: Tensor, modulations: Tensor, batch: RendererBatch) -> Tensor:
        """Predict velocities as `Renderer.forward`, of a batch without padding. Overwrites x.

        Args:
            modulations: of every layer six, then scale and shift of the last norm [M, 2n, dim], contiguous.
        """
        kernels = self._kernels
        layout, index = self._of(batch, x)
        *vectors, scale, shift = modulations.unbind()
        of_layers = [vectors[i * LAYER_VECTORS : (i + 1) * LAYER_VECTORS] for i in range(len(self._layers))]
        befores = [(shift, scale) for shift, scale, *_ in of_layers] + [(shift, scale)]
        with self._attend.backends():
            normed = kernels.modulate(x, *befores[0], index)
            for number, layer in enumerate(self._layers):
                _, _, gate1, shift2, scale2, gate2 = of_layers[number]
                attended = self._attention(number, F.linear(normed, *layer.qkv), batch, layout)
                normed = kernels.add_modulate(x, F.linear(attended, *layer.out), gate1, shift2, scale2, index)
                inner = kernels.linear_gelu(normed, *layer.inner)
                normed = kernels.add_modulate(x, F.linear(inner, *layer.outer), gate2, *befores[number + 1], index)
        return self._model.proj_out(normed)

    def _attention(self, number: int, qkv: Tensor, batch: RendererBatch, layout: AttentionLayout) -> Tensor:
        q = qkv.new_empty(len(qkv), self._heads, self._head_dim)
        kv = qkv.new_empty(2, layout.rows, self._heads, self._head_dim)
        for source_kv, (start, end) in zip(_sources(batch), layout.source_spans, strict=True):
            kv.narrow(1, start, end - start).copy_(source_kv.select(0, number).transpose(1, 2))
        self._kernels.norm_rotate(qkv, batch.cos, batch.sin, layout.kv_rows, q, kv)
        return self._attend(q, kv, layout)

    def _of(self, batch: RendererBatch, x: Tensor) -> tuple[AttentionLayout, Tensor]:
        """Return what the steps of a batch share."""
        if self._last is None or self._last[0] is not batch:
            assert sum(batch.lengths) == len(x), "a batch on a GPU has no padding"
            sources = [0 if kv is None else kv.shape[3] for kv in batch.source_kv or [None] * len(batch.lengths)]
            layout = AttentionLayout.of(batch.lengths, sources, x.device)
            self._last = batch, layout, batch.modulation_index.int()
        return self._last[1:]


def _sources(batch: RendererBatch) -> Sequence[Tensor]:
    return [kv for kv in batch.source_kv if kv is not None]
