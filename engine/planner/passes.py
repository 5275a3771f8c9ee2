"""The rows of a planner pass, what runs them, and what came of them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.planner.scheduler import Sequence


@dataclass(frozen=True)
class Pass:
    """A finished pass of one plan.

    Args:
        rows: tokens that it read.
        written: final tokens of the plan after it.
    """

    sequence: Sequence
    rows: int
    written: int


def rows_of(sequences: list[Sequence], padding_line: int, batch_size: int) -> Tensor:
    """Return lines and rows [2, batch_size]."""
    lines = [s.buffer_index for s in sequences for _ in range(s.rows)]
    rows = [row for s in sequences for row in range(s.rows)]
    padding = batch_size - len(lines)
    return torch.tensor([lines + [padding_line] * padding, rows + [0] * padding])


class Decoder(Protocol):
    """Runs passes: `HostDecoder` or `GraphDecoder`."""

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...

    @property
    def can_look_ahead(self) -> bool: ...

    def add(self, sequence: Sequence) -> None:
        """Prepare for a plan under way."""
        ...

    def decode(self, sequences: list[Sequence]) -> list[Pass]:
        """Run a pass; return finished ones."""
        ...

    def padded_batch_size(self, count: int) -> int:
        """Return the size for `count` rows."""
        ...

    def tile_height(self, batch_size: int) -> int | None:
        """Return the tile height of a batch."""
        ...
