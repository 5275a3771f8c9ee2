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
    """Draw one code a row by inverting the cumulative distribution of its nucleus.

    Args:
        logits: [B, V] float32 scores of the image codes.
        uniform: [B] numbers in [0, 1).
        temperature: [B]; 0 is greedy.
        top_p: [B] in (0, 1]; the smallest set of likeliest codes that holds this much probability is kept.
        top_k: keep at most so many codes; None keeps all.

    Returns:
        [B] codes.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    probability, code = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    keep = before < torch.where(greedy, 0.0, top_p)[:, None]
    if top_k is not None:
        keep[:, top_k:] = False
    keep[:, 0] = True
    mass = (probability * keep).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    chosen = (mass <= target).sum(-1, keepdim=True).clamp_max(keep.sum(-1, keepdim=True) - 1)
    return code.gather(-1, chosen).squeeze(-1)
