"""Weights of a layer, with its projections to queries, keys and values as one."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.glm_image.renderer import RendererLayer

Weights = tuple[Tensor, Tensor]  # with the bias


@dataclass(frozen=True)
class JoinedLayer:
    """Weights of a renderer layer."""

    qkv: Weights
    out: Weights
    inner: Weights  # of the feed-forward
    outer: Weights

    @classmethod
    def of(cls, layer: RendererLayer) -> "JoinedLayer":
        """Join a layer's projections."""
        attention, (gelu, _, outer) = layer.attn1, layer.ff.net
        weight, bias = join_projections(attention.to_q, attention.to_k, attention.to_v)
        assert bias is not None
        others = (cast(nn.Linear, part) for part in (attention.to_out[0], gelu.proj, outer))
        return cls((weight, bias), *((part.weight, part.bias) for part in others))


def join_projections(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Join linear layers of one input, which become views of the result; inference tensors only if they were."""
    with torch.inference_mode(parts[0].weight.is_inference()), torch.no_grad():
        sizes = [part.out_features for part in parts]
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
        for part, view in zip(parts, weight.split(sizes), strict=True):
            part.weight.data = view
        for part, view in zip(parts, bias.split(sizes) if bias is not None else (), strict=False):
            part.bias.data = view
    return weight, bias
