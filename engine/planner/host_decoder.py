"""Passes whose attention takes lengths from the host: on CPUs, and where no kernel reads them from the device."""

import torch
from torch import Tensor

from engine.planner.decode_step import DecodeStep
from engine.planner.passes import Pass, rows_of
from engine.planner.scheduler import Sequence
from models.batch_invariant import choose_tile_height, padded
from models.glm_image.decode_attention import DecodeAttention
from models.glm_image.paged_attention import PagedKV, SequenceKV
from models.glm_image.planner import PlannerBatch, Rotary
from models.threads import threads

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # on other devices than CPUs
TILE_HEIGHT = 16  # on CPUs
SMALL_TILE_HEIGHTS = (4, 8)  # for fewer rows, if no bit changes


class HostDecoder:
    """Runs passes and reads at once what they accepted.

    Args:
        num_threads: of a pass; None: torch's.
    """

    def __init__(self, step: DecodeStep, kv: PagedKV, num_threads: int | None):
        self._step, self._kv, self._threads = step, kv, num_threads
        self._largest_tile = choose_tile_height(TILE_HEIGHT, step.buffers.device)
        self.can_look_ahead = self._largest_tile is not None
        self.batch_sizes = (*self._small_tile_heights(), TILE_HEIGHT) if self.can_look_ahead else BATCH_SIZES
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

    @torch.inference_mode()
    def _small_tile_heights(self) -> list[int]:
        """Return the `SMALL_TILE_HEIGHTS` that give every row the same bits as `TILE_HEIGHT`.

        One try suffices: kernels depend on shapes alone, and attention runs per sequence.
        """
        model = self._step.model
        tokens = torch.arange(TILE_HEIGHT) % model.config.vocab_size
        rotary = self._step.rotary.at(tokens[:, None].expand(-1, 3), model.lm_head.weight.dtype)

        def scores(start: int, height: int) -> Tensor:
            tile = slice(start, start + height)
            batch = PlannerBatch((rotary[0][tile], rotary[1][tile]), lambda layer, q, k, v: q, height)
            return model.logits(model(tokens[tile], batch), height)

        with threads(self._threads):
            expected = scores(0, TILE_HEIGHT)
            return [
                height
                for height in SMALL_TILE_HEIGHTS
                if all(
                    torch.equal(scores(start, height), expected[start : start + height])
                    for start in range(0, TILE_HEIGHT, height)
                )
            ]

    def _reject(self, sequence: Sequence) -> int:
        """Count no token, unless it read no guess: infinities of rejected rows reach others under the mask.

        The plan goes on without guesses. Return its written tokens.
        """
        buffers, line = self._step.buffers, sequence.buffer_index
        if sequence.rows == 1:
            return sequence.written + 1
        sequence.can_look_ahead = False
        buffers.written[line], buffers.failures[line] = sequence.written, 0
        first = sequence.prompt_length + sequence.written
        self._kv.clear(torch.tensor(self._kv.slots(sequence.blocks, range(first, first + sequence.rows - 1))))
        return sequence.written
