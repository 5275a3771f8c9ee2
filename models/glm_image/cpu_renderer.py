"""The renderer on a CPU: each core takes a sequence through all layers, products are oneDNN's.

torch multiplies float32 by MKL, which uses half of the vector width on AMD; oneDNN uses all of it everywhere (one
core of an EPYC 9005: 115 and 260 GFLOP/s), and its rows do not depend on their number, so that no tiles are needed.
`CpuRenderer.check` holds this before it is used.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_invariant import padded
from models.cpu_workers import workers
from models.errors import first_line
from models.glm_image.cpu_layer import ROW_MULTIPLE, before_attention, from_attention, modulate, product, scripted
from models.glm_image.joined_weights import JoinedLayer
from models.glm_image.render_operations import RendererBatch
from models.glm_image.renderer import LAYER_VECTORS, Renderer, RendererLayer

MIN_PART_ROWS = 64
CHECKED_ROWS = (16, 64, 272, 528, 1040)


@dataclass(frozen=True)
class _Layer:
    weights: list[Tensor]  # of `before_attention`
    begin: nn.Identity  # has the hooks that are called before a layer


class _Sequence:
    """A sequence's tensors; its rows are padded to `ROW_MULTIPLE`.

    Keys and values are those of source images, then its own, then zeros; of this layer, and, in `shared` sequences, of
    the next, where other threads may be.
    """

    def __init__(self, batch: RendererBatch, start: int, length: int, source_kv: Tensor | None, dim: int, like: Tensor):
        self.start, self.length, self.source_kv = start, length, source_kv
        self.size, head_dim = padded(length, ROW_MULTIPLE), batch.cos.shape[1]
        self.sources = 0 if source_kv is None else source_kv.shape[3]
        self.x = like.new_zeros(self.size, dim)
        self.attended = like.new_zeros(self.size, dim)
        self.qkv = like.new_zeros(0)
        self._heads, self._head_dim = dim // head_dim, head_dim
        rows, padding = slice(start, start + length), (0, 0, 0, 0, 0, self.size - length)
        self.cos, self.sin = (F.pad(table[rows, None], padding) for table in (batch.cos, batch.sin))
        self.segments = _within(batch.segments, rows)
        self.segments[-1] = self.segments[-1][0], self.size, self.segments[-1][2]

    def allocate(self, is_shared: bool) -> None:
        """Allocate queries, keys and values."""
        keys = padded(self.sources + self.size, ROW_MULTIPLE)
        self.qkv = self.x.new_zeros(1 + is_shared, 3 * self._heads, keys, self._head_dim)

    @property
    def cost(self) -> int:
        """Return its rows times the keys and, roughly, the products of a row."""
        return self.size * (self.sources + self.size + 6 * self.x.shape[1])


class _Part:
    """Rows of a sequence that one thread takes through all layers."""

    def __init__(self, sequence: _Sequence, rows: slice, barrier: Barrier | None):
        self.sequence, self.rows, self.barrier = sequence, rows, barrier
        self.length = min(rows.stop, sequence.length) - rows.start  # without padding
        self.packed = slice(sequence.start + rows.start, sequence.start + rows.start + self.length)
        self.x, self.attended = sequence.x[rows], sequence.attended[rows]
        self.segments = _within(sequence.segments, rows)


class CpuRenderer:
    """Shares the weights of a `Renderer`, whose projections become views of joined ones."""

    def __init__(self, model: Renderer):
        config = model.config
        self._model, self._heads, self._head_dim = model, config.num_attention_heads, config.attention_head_dim
        self._layers = [_layer(cast(RendererLayer, layer)) for layer in model.transformer_blocks]
        weight = model.proj_out.weight
        # On queries and keys alike: scores are exponents of 2, divided by the root of D.
        self._key_scale = math.sqrt(math.log2(math.e) / math.sqrt(self._head_dim))
        self._norm = weight.new_tensor([[self._key_scale], [0.0]]).repeat(1, self._head_dim)
        self._before, self._from = scripted(before_attention), scripted(from_attention)
        self._threads = torch.get_num_threads()
        self._planned: tuple[ref[RendererBatch], list[_Part]] | None = None

    def __call__(self, x: Tensor, modulations: Tensor, batch: RendererBatch) -> Tensor:
        """Predict velocities as `Renderer.forward`."""
        if self._planned is None or self._planned[0]() is not batch:
            parts = list(_cut(_sequences(batch, x), self._threads))
            self._planned = ref(batch, self._forget), parts  # buffers live as long as their batch
        parts = self._planned[1]
        velocity = x.new_zeros(len(x), self._model.config.patch_dim)

        def run(part: _Part) -> None:
            try:
                velocity[part.packed] = self._run(part, x, modulations)
            except BaseException:
                self._planned = None
                for other in parts:
                    if other.barrier:
                        other.barrier.abort()
                raise

        workers(self._threads).run([partial(run, part) for part in parts])
        return velocity

    def _forget(self, batch: ref[RendererBatch]) -> None:
        if self._planned is not None and self._planned[0] is batch:
            self._planned = None

    def _run(self, part: _Part, x: Tensor, modulations: Tensor) -> Tensor:
        """Take a part through all layers."""
        part.x[: part.length].copy_(x[part.packed])
        part.x[part.length :].zero_()
        for number, vectors in enumerate(modulations[:-2].split(LAYER_VECTORS)):
            self._run_layer(part, number, vectors)
        scale, shift = modulations[-2:]
        proj_out = self._model.proj_out
        return product(modulate(part.x, scale, shift, part.segments), proj_out.weight, proj_out.bias)[: part.length]

    def _run_layer(self, part: _Part, number: int, vectors: Tensor) -> None:
        layer, sequence, rows = self._layers[number], part.sequence, part.rows
        layer.begin(part.x)
        sources, qkv = sequence.sources, sequence.qkv[number % len(sequence.qkv)]
        qk, v = qkv[: 2 * self._heads], qkv[2 * self._heads :]
        own = slice(sources + rows.start, sources + rows.stop)
        self._before(
            part.x,
            vectors,
            part.segments,
            layer.weights,
            self._norm,
            sequence.cos[rows],
            sequence.sin[rows],
            qk[:, own],
            v[:, own],
            part.length,
        )
        if sequence.source_kv is not None and not rows.start:
            source_k, source_v = sequence.source_kv[number]
            torch.mul(source_k, self._key_scale, out=qk[self._heads :, :sources])
            v[:, :sources].copy_(source_v)
        if part.barrier:
            part.barrier.wait()
        q, k = qk[: self._heads, own], qk[self._heads :]
        keys = sources + sequence.length
        self._from(part.x, vectors, part.segments, layer.weights, q, k, v, keys, part.attended)

    @torch.inference_mode()
    def check(self) -> str | None:
        """Return why it cannot be used: a product differs from torch or depends on the number of rows."""
        weights = {part.shape: part for layer in self._layers for part in layer.weights[::2]}
        for weight in weights.values():
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(max(CHECKED_ROWS), weight.shape[1], generator=draw).to(weight.dtype)
            whole = product(x, weight, activation="gelu")
            parts = [product(x[:rows], weight, activation="gelu") for rows in CHECKED_ROWS]
            if not all(torch.equal(part, whole[: len(part)]) for part in parts):
                return "rows depend on their number"
            expected = F.gelu(F.linear(x, weight).float(), approximate="tanh")
            error = float((whole.float() - expected).abs().max() / expected.abs().max())
            if not error < max(1e-5, 2 * torch.finfo(weight.dtype).eps):
                return f"differs from torch by {error:.2g}"
        return None


def choose_cpu_renderer(model: Renderer) -> tuple[CpuRenderer | None, dict[str, str]]:
    """Return it if it passes its check, else None and why."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[attr-defined]
        return None, {"onednn": "torch was built without it"}
    failures: list[str | None] = []
    try:
        renderer = CpuRenderer(model)
        workers(1).run([lambda: failures.append(renderer.check())])  # with one thread, as it is used
    except (RuntimeError, AttributeError) as error:  # no such operation, or not for this processor
        return None, {"onednn": first_line(error)}
    [failure] = failures
    return (renderer, {}) if failure is None else (None, {"onednn": failure})


def _sequences(batch: RendererBatch, x: Tensor) -> Iterator[_Sequence]:
    start = 0
    for length, source_kv in zip(batch.lengths, batch.source_kv or [None] * len(batch.lengths), strict=True):
        yield _Sequence(batch, start, length, source_kv, x.shape[1], x)
        start += length


def _within(segments: list[tuple[int, int, int]], rows: slice) -> list[tuple[int, int, int]]:
    """Return the parts of segments in `rows`, counted from their first."""
    cut = [(max(start, rows.start), min(end, rows.stop), index) for start, end, index in segments]
    return [(start - rows.start, end - rows.start, index) for start, end, index in cut if start < end]


def _cut(sequences: Iterable[_Sequence], threads: int) -> Iterator[_Part]:
    """Cut what is left over for all threads into parts, which start together; then return whole sequences."""
    ordered = sorted(sequences, key=lambda sequence: -sequence.cost)
    for index, sequence in enumerate(ordered):
        left_over = len(ordered) % threads
        count = min(threads // left_over, max(1, sequence.size // MIN_PART_ROWS)) if index < left_over else 1
        height = padded(-(-sequence.size // count), ROW_MULTIPLE)
        starts = range(0, sequence.size, height)
        barrier = Barrier(len(starts)) if len(starts) > 1 else None
        sequence.allocate(is_shared=len(starts) > 1)
        for start in starts:
            yield _Part(sequence, slice(start, min(start + height, sequence.size)), barrier)


def _layer(layer: RendererLayer) -> _Layer:
    """Join queries and keys, which are normalised and rotated, apart from values."""
    joined = JoinedLayer.of(layer)
    weight, bias = joined.qkv
    queries_keys = 2 * len(weight) // 3
    split = [weight[:queries_keys], bias[:queries_keys], weight[queries_keys:], bias[queries_keys:]]
    return _Layer([*split, *joined.out, *joined.inner, *joined.outer], cast(nn.Identity, layer.ff.net[1]))
