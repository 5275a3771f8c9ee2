"""The arithmetic of a sequence's rows in a layer, as TorchScript: threads in it do not wait for Python's lock.

Numbers of rows and of keys are multiples of `ROW_MULTIPLE`: oneDNN compiles a kernel for every new shape (0.5 ms), and
vector loops have no tails, which would round differently.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 16


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Return x [rows, K] times `weight` [N, K] transposed, plus `bias`, by oneDNN."""
    scalars: list[float | int | complex | None] = []
    algorithm = "tanh" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, scalars, algorithm)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, segments: list[tuple[int, int, int]]) -> Tensor:
    """Return the layer norm of x [rows, dim], times `scale`, plus `shift` [2n, dim] of every segment."""
    normed: list[Tensor] = []
    for start, end, index in segments:
        normed.append(F.layer_norm(x[start:end], x.shape[1:], scale[index], shift[index], 1e-5))
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def add_gated(x: Tensor, delta: Tensor, gate: Tensor, segments: list[tuple[int, int, int]]) -> None:
    """Add gate * delta to x, by the `gate` [2n, dim] of every segment."""
    for start, end, index in segments:
        x[start:end].addcmul_(delta[start:end], gate[index])


def before_attention(
    x: Tensor,
    vectors: Tensor,
    segments: list[tuple[int, int, int]],
    weights: list[Tensor],
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk: Tensor,
    v: Tensor,
    length: int,
) -> None:
    """Write queries and keys [2 * heads, rows, D] and values [heads, rows, D] of x [rows, dim].

    Args:
        vectors: of `Modulation`.
        segments: (start, end, line of `vectors`).
        weights: with biases: of queries and keys, values, output, both layers of the feed-forward.
        norm: what norms of queries and keys are multiplied by, and zeros [2, D].
        length: rows of values to be written.
    """
    head_dim = qk.shape[2]
    half = head_dim // 2
    normed = modulate(x, vectors[1], vectors[0], segments)
    plain = product(normed, weights[0], weights[1]).unflatten(1, [-1, head_dim])
    plain = F.layer_norm(plain, [head_dim], norm[0], norm[1], 1e-5)  # [rows, 2 * heads, D]
    rotated = qk.transpose(0, 1)
    torch.mul(plain, cos, out=rotated)
    rotated[:, :, :half].addcmul_(plain[:, :, half:], sin[:, :, :half], value=-1)
    rotated[:, :, half:].addcmul_(plain[:, :, :half], sin[:, :, half:])
    values = product(normed, weights[2], weights[3]).unflatten(1, [-1, head_dim])
    v[:, :length].copy_(values[:length].transpose(0, 1))


def from_attention(
    x: Tensor,
    vectors: Tensor,
    segments: list[tuple[int, int, int]],
    weights: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: int,
    attended: Tensor,
) -> None:
    """Let queries [heads, rows, D] attend to the first `keys` of k and v [heads, all keys, D]; finish the layer on x.

    A block of queries has 512 kB of scores, which stay in a core's cache. Norms bound scores, exponents of 2: their
    powers need no maximum to be subtracted.
    """
    heads, rows, head_dim = q.shape
    blocks = (rows * k.shape[1] + 131071) // 131072
    height = ((rows + blocks - 1) // blocks + 15) // 16 * 16
    for head in range(heads):
        out = attended[:, head * head_dim : (head + 1) * head_dim]
        for start in range(0, rows, height):
            power = product(q[head, start : start + height], k[head]).exp2_()
            total = power[:, :keys].sum(1, keepdim=True)
            torch.div(product(power, v[head].t()), total, out=out[start : start + height])
    add_gated(x, product(attended, weights[4], weights[5]), vectors[2], segments)
    inner = product(modulate(x, vectors[4], vectors[3], segments), weights[6], weights[7], "gelu")
    add_gated(x, product(inner, weights[8], weights[9]), vectors[5], segments)


def scripted(function: Callable[..., None]) -> Callable[..., Any]:
    """Compile to TorchScript, which does the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)
