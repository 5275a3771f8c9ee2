"""Sampling of the next image code: a pure function of a row's scores, its uniform number and its settings, so that a
sequence's tokens do not depend on the batch. No generator is kept and nothing is read back from the device."""

import torch
from torch import Tensor

PLAN_STREAM = 0x506C616E  # keeps a plan's uniforms apart from the noise, which uses the seed itself


def uniforms(seed: int, tokens: int) -> Tensor:
    """Return uniform numbers [tokens] float32 in [0, 1): all that a plan needs, drawn from its seed in advance."""
    generator = torch.Generator("cpu").manual_seed((seed ^ PLAN_STREAM) & 0xFFFFFFFFFFFFFFFF)
    return torch.rand(tokens, generator=generator, dtype=torch.float32)


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: int | None) -> Tensor:
    """Sample one code [B] per row by inverting the cumulative distribution of its nucleus.

    Of equally likely codes the lowest comes first.

    Args:
        logits: [B, V] float32 scores of the image codes.
        uniform: [B] numbers in [0, 1).
        temperature: [B]; 0 is greedy.
        top_p: [B] in (0, 1]; keeps the smallest set of likeliest codes that has this much probability.
        top_k: keeps this many of the likeliest codes, before `top_p`; None keeps all.
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
    """Return the codes [B, count] of the highest scores, in order."""
    if count is None or count >= logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    # Sorting a whole row takes many times as long as `topk`, which leaves the order of equal scores undefined.
    code = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return code.gather(-1, logits.gather(-1, code).sort(dim=-1, descending=True, stable=True).indices)
