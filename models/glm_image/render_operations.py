"""What a renderer layer computes beside matrix products, in torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class RendererBatch:
    """What layers need to know of a batch; built once for many steps."""

    lengths: Sequence[int]  # of all sequences; the rest of T is padding
    modulation_index: Tensor  # [T]: 2 * image for a patch, 2 * image + 1 for a glyph token
    cos: Tensor  # [T, D] rotary table; 1 for glyph tokens and padding
    sin: Tensor  # [T, D]; 0 for glyph tokens and padding
    tile_height: int | None = None  # see `models.batch_invariant`; T is a multiple of it
    # Keys and values [layers, 2, heads, S, D].
    source_kv: Sequence[Tensor | None] = ()  # one per sequence, which attends to it
    kv_out: Tensor | None = None  # filled by the layers from the first S tokens

    def source_kv_of(self, layer_index: int) -> Sequence[Tensor | None]:
        """Return every sequence's [2, heads, S, D] in a layer."""
        return [None if kv is None else kv[layer_index] for kv in self.source_kv or [None] * len(self.lengths)]

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """Return runs of tokens with the same modulation: (start, end, its index). Waits for the device."""
        indices, counts = torch.unique_consecutive(self.modulation_index, return_counts=True)
        ends = counts.cumsum(0)
        return list(zip((ends - counts).tolist(), ends.tolist(), indices.tolist(), strict=True))


def modulate(x: Tensor, scale: Tensor, shift: Tensor, batch: RendererBatch) -> Tensor:
    """Return the layer norm of x [T, dim], times `scale`, plus `shift` [2n, dim] of every token's modulation."""
    out = F.layer_norm(x, x.shape[-1:], eps=EPS)
    for start, end, index in batch.segments:
        out[start:end].mul_(scale[index]).add_(shift[index])
    return out


def rotate(x: Tensor, batch: RendererBatch) -> Tensor:
    """Rotate x [T, heads, D] in float32, i with i + D/2."""
    half = x.shape[-1] // 2
    cos, sin = batch.cos[:, None], batch.sin[:, None]
    rotated = x.float() * cos
    rotated[..., :half] -= x[..., half:] * sin[..., :half]
    rotated[..., half:] += x[..., :half] * sin[..., half:]
    return rotated.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, batch: RendererBatch, layer_index: int) -> Tensor:
    """Let sequences attend to themselves, and to their source images: [T, heads, D] -> [T, heads * D]."""
    out = q.new_zeros(len(q), q.shape[1] * q.shape[2])
    start = 0
    for length, source_kv in zip(batch.lengths, batch.source_kv_of(layer_index), strict=True):
        sequence = slice(start, start + length)
        query, keys, values = (h[sequence].transpose(0, 1)[None] for h in (q, k, v))  # [1, heads, tokens, D]
        if source_kv is not None:
            keys, values = (torch.cat([s[None], h], dim=2) for s, h in zip(source_kv, (keys, values), strict=True))
        attended = F.scaled_dot_product_attention(query, keys, values)
        out[sequence] = attended[0].transpose(0, 1).flatten(1)
        start += length
    return out


def add_gated(x: Tensor, delta: Tensor, gate: Tensor, batch: RendererBatch) -> Tensor:
    """Return x + gate * delta, by `gate` [2n, dim] of every token's modulation; overwrites x and delta [T, dim]."""
    for start, end, index in batch.segments:
        delta[start:end].mul_(gate[index])
    return x.add_(delta)
