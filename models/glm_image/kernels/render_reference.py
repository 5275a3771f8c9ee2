"""The renderer's kernels in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.glm_image.render_operations import EPS


def modulate(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Normalise and modulate as `render_layer.modulate`."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normed.mul_(scale.index_select(0, index)).add_(shift.index_select(0, index))


def add_modulate(x: Tensor, delta: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Add and modulate as `render_layer.add_modulate`."""
    x.add_(delta.mul_(gate.index_select(0, index)))
    return modulate(x, shift, scale, index)


def norm_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, q: Tensor, kv: Tensor) -> None:
    """Normalise, rotate and write as `render_layer.norm_rotate`."""
    heads, head_dim = q.shape[1:]
    queries, keys, values = qkv.view(-1, 3, heads, head_dim).unbind(1)
    q.copy_(_rotated(queries, cos, sin))
    kv.index_copy_(1, rows.long(), torch.stack([_rotated(keys, cos, sin), values]))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU (tanh) of a linear layer."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    turned = torch.cat([-normed[..., half:], normed[..., :half]], dim=-1)
    return (normed * cos[:, None] + turned * sin[:, None]).to(x.dtype)
