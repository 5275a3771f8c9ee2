"""Look-ahead: a decode pass reads the last known token of a plan and guesses of those after it."""

import heapq
from functools import cache

from engine.geometry import Grid
from engine.planner.scheduler import Sequence

MIN_GAIN = 0.1  # expected tokens of a row that pays for its sampling


class LookAhead:
    """Shares the rows of a pass out over sequences, for the most tokens per second.

    Args:
        pass_seconds: by batch size, ascending; if empty, every sequence gets one row.
    """

    def __init__(self, pass_seconds: dict[int, float]):
        self._pass_seconds = pass_seconds
        self._largest = max(pass_seconds, default=1)

    def share(self, sequences: list[Sequence], *, memory_is_short: bool = False) -> None:
        """Set the rows of every sequence."""
        count, tiles = len(sequences), -(-len(sequences) // self._largest)
        gains = [] if memory_is_short else _gains(sequences, tiles * self._largest - count)
        sizes = self._pass_seconds if tiles == 1 else {tiles * self._largest: 1.0}
        best, rate = 0, 0.0
        for size, seconds in sizes.items():
            extra = gains[: max(0, size - count)]
            tokens = count + sum(gain for gain, _ in extra)
            if size >= count and tokens / seconds > rate:
                best, rate = len(extra), tokens / seconds
        for sequence in sequences:
            sequence.rows = 1
        for _, sequence in gains[:best]:
            sequence.rows += 1


def _gains(sequences: list[Sequence], count: int) -> list[tuple[float, Sequence]]:
    """Return up to `count` further rows, best first: the expected tokens and the sequence.

    A row brings a token if all guesses up to it agree.
    """
    heap = [(-s.agreement, index, s.agreement) for index, s in enumerate(sequences) if s.max_rows > 1]
    heapq.heapify(heap)
    rows = [1] * len(sequences)
    gains: list[tuple[float, Sequence]] = []
    while heap and len(gains) < count and -heap[0][0] >= MIN_GAIN:
        gain, index, agreement = heapq.heappop(heap)
        gains.append((-gain, sequences[index]))
        rows[index] += 1
        if rows[index] < sequences[index].max_rows:
            heapq.heappush(heap, (gain * agreement, index, agreement))
    return gains


@cache
def guess_sources(grids: tuple[Grid, ...]) -> list[int]:
    """Return for every token of a plan the earlier one that it most often equals.

    In the second grid that of the preview at the same place, else the token above.
    """
    sources: list[int] = []
    for grid in grids:
        first = len(sources)
        for row in range(grid.rows):
            for col in range(grid.cols):
                above = first + (row - 1) * grid.cols + col
                sources.append(_same_place(grids[0], grid, row, col) if first else max(0, above))
    return sources


def _same_place(preview: Grid, grid: Grid, row: int, col: int) -> int:
    preview_row = (2 * row + 1) * preview.rows // (2 * grid.rows)
    return preview_row * preview.cols + (2 * col + 1) * preview.cols // (2 * grid.cols)
