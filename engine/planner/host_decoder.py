"""Passes whose attention takes lengths from the host: on CPUs, and where no kernel reads them from the device."""

import torch
from torch import Tensor

from engine.planner.decode_step import DecodeStep
from engine.planner.passes import Pass, rows_of
from engine.planner.scheduler import Sequence
from engine.planner.threads import threads
from models.batch_invariant import padded
from models.glm_image.decode_attention import DecodeAttention
from models.glm_image.paged_attention import PagedKV, SequenceKV
from models.glm_image.planner import PlannerBatch, Rotary

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # on other devices than CPUs


class HostDecoder:
    """Runs passes and reads at once what they accepted.

    Args:
        tile_heights: ascending; empty except on CPUs.
        num_threads: of a pass; None: torch's.
    """

    def __init__(self, step: DecodeStep, kv: PagedKV, tile_heights: tuple[int, ...], num_threads: int | None):
        self.batch_sizes = tile_heights or BATCH_SIZES
        self.can_look_ahead = bool(tile_heights)
        self._step, self._kv, self._threads = step, kv, num_threads
        self._largest_tile = tile_heights[-1] if tile_heights else None
        self._kv_of: dict[int, SequenceKV] = {}  # by line of the buffers

    def add(self, sequence: Sequence) -> None:
        """Prepare for a plan under way."""
        self._kv_of[sequence.buffer_index] = SequenceKV(self._kv, sequence.blocks)

    def decode(self, sequences: list[Sequence]) -> list[Pass]:
        """Run and finish a pass."""
        counts = [s.rows for s in sequences]
        total, buffers = sum(counts), self._step.buffers
        lines, rows = rows_of(sequences, buffers.padding_line, self.padded_batch_size(total)).to(buffers.device)
        keys_and_values = [self._kv_of[s.buffer_index] for s in sequences]
        lengths = [s.cached for s in sequences]
        tile_height = self.tile_height(len(lines))

        def network(tokens: Tensor, rotary: Rotary, slots: Tensor, *_: Tensor) -> Tensor:
            attention = DecodeAttention(self._kv, keys_and_values, lengths, counts, slots[:total])
            return self._step.model(tokens, PlannerBatch(rotary, attention, tile_height))

        with threads(self._threads):
            is_finite = self._step(lines, rows, network, tile_height)
        if total == len(sequences):  # without guesses nothing is read
            return [Pass(s, 1, s.written + 1) for s in sequences]
        written = buffers.written[: buffers.padding_line].tolist()
        passes: list[Pass] = []
        for sequence, all_finite in zip(sequences, is_finite[:total].split(counts), strict=True):
            is_sound = bool(all_finite.all())
            passes.append(
                Pass(sequence, sequence.rows, written[sequence.buffer_index] if is_sound else self._reject(sequence))
            )
        return passes

    def padded_batch_size(self, count: int) -> int:
        """Return the size for `count` rows."""
        return next((size for size in self.batch_sizes if size >= count), padded(count, self._largest_tile))

    def tile_height(self, batch_size: int) -> int | None:
        return None if self._largest_tile is None else min(self._largest_tile, batch_size)

    def _reject(self, sequence: Sequence) -> int:
        """Count no token, unless it read no guess: infinities of rejected rows reach others under the mask.

        The plan goes on without guesses. Return its written tokens.
        """
        buffers, line = self._step.buffers, sequence.buffer_index
        if sequence.rows == 1:
            return sequence.written + 1
        sequence.can_look_ahead = False
        buffers.written[line], buffers.failures[line] = sequence.written, 0
        block_size, first = self._kv.block_size, sequence.prompt_length + sequence.written
        tokens = range(first, first + sequence.rows - 1)
        self._kv.clear(torch.tensor([sequence.blocks[t // block_size] * block_size + t % block_size for t in tokens]))
        return sequence.written
