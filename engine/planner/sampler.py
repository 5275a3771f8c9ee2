"""A code depends on its row, not on the batch, and is not read from the device."""

import torch
from torch import Tensor

PLAN_STREAM = 0x506C616E  # keeps uniforms apart from the noise, which uses the seed itself


def uniforms(seed: int, tokens: int) -> Tensor:
    """Draw a plan's uniform numbers [tokens] in [0, 1)."""
    generator = torch.Generator("cpu").manual_seed((seed ^ PLAN_STREAM) & 0xFFFFFFFFFFFFFFFF)
    return torch.rand(tokens, generator=generator, dtype=torch.float32)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: int | None) -> Tensor:
    """Sample a code per row by inverting its nucleus's cumulative distribution; ties go to the lowest code.

    Args:
        logits: [B, V] float32; other tensors are [B].
        temperature: 0 is greedy.
        top_p: in (0, 1]; the smallest set of likeliest codes with this probability.
        top_k: so many codes, before `top_p`.
    """
    greedy = temperature == 0
    code = _likeliest(logits, top_k)
    score = logits.gather(-1, code)
    probability = torch.softmax(score / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    before = probability.cumsum(-1) - probability
    kept = before < torch.where(greedy, 0.0, top_p)[:, None]
    kept[:, 0] = True
    mass = (probability * kept).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    index = (mass <= target).sum(-1, keepdim=True).clamp_max(kept.sum(-1, keepdim=True) - 1)
    return code.gather(-1, index).squeeze(-1)


def _likeliest(logits: Tensor, count: int | None) -> Tensor:
    if count is None or count >= logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    # Sorting takes many times as long as `topk`, which leaves equal scores unordered.
    code = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return code.gather(-1, logits.gather(-1, code).sort(dim=-1, descending=True, stable=True).indices)
