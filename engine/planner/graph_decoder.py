"""Captured passes. The host launches one before it knows what the last accepted: a plan that is done idles for one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.planner.decode_step import DecodeStep, Network
from engine.planner.passes import Pass, rows_of
from engine.planner.scheduler import Sequence


class Graphs(Protocol):
    """`CudaGraphs`, or a stand-in."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Run and capture `work`; return what replays it."""
        ...

    def copy(self, tensor: Tensor) -> Callable[[], list[Any]]:
        """Begin a copy; return what waits for it."""
        ...

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Copy a host tensor between replays."""
        ...


@dataclass(frozen=True)
class _Launch:
    rows: list[tuple[Sequence, int]]
    read: Callable[[], list[int]]


class GraphDecoder:
    """Replays a pass per batch size and bound of lengths.

    Args:
        networks: by the longest sequence they take, ascending.
        batch_sizes: ascending. With one size, a plan's bits never depend on other plans.
    """

    can_look_ahead = True

    def __init__(self, step: DecodeStep, networks: dict[int, Network], batch_sizes: tuple[int, ...], graphs: Graphs):
        self.batch_sizes = batch_sizes
        self._step, self._networks, self._graphs = step, networks, graphs
        padding = torch.tensor([[step.buffers.padding_line], [0]]).expand(2, batch_sizes[-1])
        self._rows = padding.to(step.buffers.device).clone()  # read by all graphs
        self._uploaded = padding
        self._replays: dict[tuple[int, int], Callable[[], object]] = {}
        self._sequence_of: dict[int, Sequence] = {}  # by line of the buffers
        self._launched: _Launch | None = None

    def capture(self, *, eagerly: bool = False) -> None:
        """Capture all passes, which takes seconds; or let passes run `eagerly`, to compare."""
        for batch_size in self.batch_sizes:
            lines, rows = self._rows[:, :batch_size]
            for length, network in self._networks.items():

                def run(lines: Tensor = lines, rows: Tensor = rows, network: Network = network) -> None:
                    self._step(lines, rows, network, None)

                self._replays[batch_size, length] = run if eagerly else self._graphs.capture(run)

    def add(self, sequence: Sequence) -> None:
        """Prepare for a plan under way."""
        self._sequence_of[sequence.buffer_index] = sequence

    def decode(self, sequences: list[Sequence]) -> list[Pass]:
        """Launch a pass; return the one launched before."""
        batch_size = self.padded_batch_size(sum(s.rows for s in sequences))
        longest = max(s.prompt_length + s.total for s in sequences)
        rows = rows_of(sequences, self._step.buffers.padding_line, batch_size)
        if not torch.equal(rows, self._uploaded[:, :batch_size]):
            self._graphs.upload(rows, self._rows[:, :batch_size])
            self._uploaded = torch.cat([rows, self._uploaded[:, batch_size:]], dim=1)
        self._replays[batch_size, next(length for length in self._networks if length >= longest)]()
        read = self._graphs.copy(self._step.buffers.written)
        before, self._launched = self._launched, _Launch([(s, s.rows) for s in sequences], read)
        return self._passes(before) if before else []

    def padded_batch_size(self, count: int) -> int:
        """Return the size for `count` rows."""
        return next(size for size in self.batch_sizes if size >= count)

    def tile_height(self, batch_size: int) -> int | None:
        return None

    def _passes(self, launch: _Launch) -> list[Pass]:
        written = launch.read()
        return [
            Pass(sequence, rows, written[sequence.buffer_index])
            for sequence, rows in launch.rows
            if self._sequence_of[sequence.buffer_index] is sequence
        ]
