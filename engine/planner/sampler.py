"""Choosing the next image code. A pure function of a row's scores, its uniform number and its settings: it does not
know the other rows, holds no generator, and reads nothing back from the device."""

import torch
from torch import Tensor

PLAN_STREAM = 0x506C616E  # keeps a plan's uniforms apart from the noise, which uses the seed itself


def uniforms(seed: int, tokens: int) -> Tensor:
    """[tokens] float32 uniform numbers in [0, 1): all a plan will need, drawn from its seed before it begins."""
    generator = torch.Generator("cpu").manual_seed((seed ^ PLAN_STREAM) & 0xFFFFFFFFFFFFFFFF)
    return torch.rand(tokens, generator=generator, dtype=torch.float32)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: int | None) -> Tensor:
    """Draw one code a row by inverting the cumulative distribution of its nucleus. Of equally likely codes the lowest
    comes first.

    Args:
        logits: [B, V] float32 scores of the image codes.
        uniform: [B] numbers in [0, 1).
        temperature: [B]; 0 is greedy.
        top_p: [B] in (0, 1]; the smallest set of likeliest codes that holds this much probability is kept.
        top_k: before that, all but so many of the likeliest codes are left out; None leaves none out.

    Returns:
        [B] codes.
    """
    greedy = temperature == 0
    code = _likeliest(logits, top_k)
    score = logits.gather(-1, code)
    probability = torch.softmax(score / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    before = probability.cumsum(-1) - probability
    keep = before < torch.where(greedy, 0.0, top_p)[:, None]
    keep[:, 0] = True
    mass = (probability * keep).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    chosen = (mass <= target).sum(-1, keepdim=True).clamp_max(keep.sum(-1, keepdim=True) - 1)
    return code.gather(-1, chosen).squeeze(-1)


def _likeliest(logits: Tensor, count: int | None) -> Tensor:
    """[B, count] codes of the highest scores, in order."""
    if count is None or count >= logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    # Putting all of a row in order takes many times as long as finding a few. `topk` leaves the order of equals open.
    code = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return code.gather(-1, logits.gather(-1, code).sort(dim=-1, descending=True, stable=True).indices)
