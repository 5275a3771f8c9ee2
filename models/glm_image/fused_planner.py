"""The planner with few, large operations, for passes of a row per sequence or several on a GPU.

Query, key and value projections are one product; norms, rotation, cache writes and activation are kernels, or
the same arithmetic in torch.
"""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.glm_image.joined_weights import join_projections
from models.glm_image.kernels.check import DecodeKernels, PagedAttention
from models.glm_image.paged_attention import PagedKV
from models.glm_image.planner import Planner, PlannerAttention, PlannerLayer, Rotary


@dataclass(frozen=True)
class _Layer:
    qkv: tuple[Tensor, Tensor | None]
    o: Tensor
    gate_up: Tensor
    down: Tensor
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor
    before_next: Tensor


class FusedPlanner:
    """Shares the weights of a `Planner`, whose projections become views of joined ones.

    Args:
        tables: blocks of sequences [sequences, blocks], int32.
    """

    def __init__(self, model: Planner, kv: PagedKV, tables: Tensor, kernels: DecodeKernels):
        self._kv, self._tables, self._kernels = kv, tables, kernels
        self._embed, self._eps = model.embed_tokens.weight, model.config.rms_norm_eps
        layers = [cast(PlannerLayer, layer) for layer in model.layers]
        norms = [layer.input_layernorm.weight for layer in layers] + [model.norm.weight]
        self._first_norm = norms[0]
        self._layers = [
            _Layer(
                join_projections(*_projections(layer.self_attn)),
                layer.self_attn.o_proj.weight,
                layer.mlp.gate_up_proj.weight,
                layer.mlp.down_proj.weight,
                layer.post_self_attn_layernorm.weight,
                layer.post_attention_layernorm.weight,
                layer.post_mlp_layernorm.weight,
                before_next,
            )
            for layer, before_next in zip(layers, norms[1:], strict=True)
        ]

    def __call__(
        self, attend: PagedAttention, tokens: Tensor, rotary: Rotary, slots: Tensor, lines: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the hidden states [N, C] of tokens [N].

        Args:
            slots: of their keys and values [N].
            lines: each row's line of the tables [N], int32.
            lengths: tokens that it sees [N], int32.
        """
        kernels, eps = self._kernels, self._eps
        x = F.embedding(tokens, self._embed)
        normed = kernels.rms_norm(x, self._first_norm, eps)
        for index, layer in enumerate(self._layers):
            q = kernels.rotate_and_write(F.linear(normed, *layer.qkv), *rotary, self._kv.pool[index], slots)
            attended = attend(index, q, self._tables, lines, lengths).flatten(1)
            x, normed = kernels.add_rms_norm(
                x, F.linear(attended, layer.o), layer.after_attention, layer.before_mlp, eps
            )
            mlp = F.linear(kernels.swiglu(F.linear(normed, layer.gate_up)), layer.down)
            x, normed = kernels.add_rms_norm(x, mlp, layer.after_mlp, layer.before_next, eps)
        return normed


def _projections(attention: PlannerAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj
