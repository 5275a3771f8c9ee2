"""The kernels' arithmetic in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PagedDecode:
    """Attention as `paged_decode.PagedDecode`, over copies of rows' whole tables."""

    def __init__(self, pool: Tensor, group: int, max_length: int, max_rows: int):
        self.pool, self.group = pool, group
        self._blocks = -(-max_length // pool.shape[2])

    def __call__(self, layer: int, q: Tensor, tables: Tensor, row_sequence: Tensor, lengths: Tensor) -> Tensor:
        """Attend; what a row does not see must be finite."""
        pages = self.pool[layer][tables[row_sequence, : self._blocks].long()].flatten(1, 2)
        k, v = pages.permute(2, 0, 3, 1, 4)
        is_seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        attended = F.scaled_dot_product_attention(
            q.unflatten(1, (-1, self.group)), k, v, attn_mask=is_seen[:, None, None]
        )
        return attended.flatten(1, 2)


def rotate_and_write(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """Rotate and store as `layer.rotate_and_write`."""
    groups, head_dim = cache.shape[-2:]
    heads = qkv.unflatten(1, (-1, head_dim))
    first, second = heads[:, :-groups, : cos.shape[1]].chunk(2, dim=-1)
    (first_cos, second_cos), (first_sin, second_sin) = cos.unsqueeze(1).chunk(2, -1), sin.unsqueeze(1).chunk(2, -1)
    rotated = [first * first_cos - second * first_sin, second * second_cos + first * second_sin]
    q_k = torch.cat([*(x.to(qkv.dtype) for x in rotated), heads[:, :-groups, cos.shape[1] :]], dim=-1)
    k_v = torch.stack([q_k[:, -groups:], heads[:, -groups:]], dim=1)
    cache.flatten(0, 1).index_copy_(0, slots, k_v)
    return q_k[:, :-groups].contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise as `layer.rms_norm`."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, delta_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add and normalise as `layer.add_rms_norm`."""
    total = x + rms_norm(delta, delta_weight, eps)
    return total, rms_norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiply as `layer.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def nucleus(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Sample as `nucleus.nucleus`, by a sort."""
    is_greedy = temperature == 0
    score, code = logits.float().sort(dim=-1, descending=True, stable=True)
    is_outside = (
        torch.arange(score.shape[1], device=score.device) >= torch.where(top_k > 0, top_k, score.shape[1])[:, None]
    )
    score = (score / torch.where(is_greedy, 1.0, temperature)[:, None]).masked_fill(is_outside, float("-inf"))
    probability = torch.softmax(score, dim=-1)
    before = probability.cumsum(-1) - probability
    kept = (before < torch.where(is_greedy, 0.0, top_p)[:, None]) & ~is_outside
    kept[:, 0] = True
    mass = (probability * kept).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    index = (mass <= target).sum(-1, keepdim=True).minimum(kept.sum(-1, keepdim=True) - 1)
    return code.gather(-1, index).squeeze(-1)
