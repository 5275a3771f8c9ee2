"""Tokens stay on the device; the host reads complete plans."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.geometry import MAX_SIDE
from engine.jobs.job import JobSpec
from engine.planner.lookahead import guess_sources
from engine.planner.sampler import sample, uniforms
from engine.planner.scheduler import PromptGroup, Sequence
from engine.request import Request
from models.batch_invariant import choose_tile_height, padded
from models.errors import NonFiniteError
from models.glm_image.config import SamplingDefaults
from models.glm_image.decode_attention import DecodeAttention
from models.glm_image.paged_attention import PagedKV, PrefillAttention, SequenceKV
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable, plan_positions

DECODE_TILE_HEIGHT = 16  # on CPU
SMALL_TILE_HEIGHTS = (4, 8)  # for fewer sequences, if no bit changes
PREFILL_TILE_HEIGHT = 128
ONE_THREAD_UP_TO = 16_000_000  # parameters: CPU threads would mostly wait
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # on other devices, each one graph


class PlannerRunner:
    """Prefill and decode over a paged cache.

    Args:
        max_positions: of the longest prompt and largest plan together.
    """

    def __init__(
        self,
        model: Planner,
        kv: PagedKV,
        sampling: SamplingDefaults,
        *,
        max_sequences: int,
        max_plan_tokens: int,
        max_positions: int,
    ):
        self.model, self.kv, self.sampling = model, kv, sampling
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.rotary = RotaryTable(model.config, max_positions, self.device)
        self.decode_tile_height = choose_tile_height(DECODE_TILE_HEIGHT, self.device)
        self.prefill_tile_height = choose_tile_height(PREFILL_TILE_HEIGHT, self.device)
        self._tokens = torch.zeros(max_sequences, max_plan_tokens, dtype=torch.long, device=self.device)
        self._uniforms = torch.zeros(max_sequences, max_plan_tokens, device=self.device)
        self._positions = torch.zeros(max_sequences, max_plan_tokens, 3, dtype=torch.long, device=self.device)
        self._temperature = torch.zeros(max_sequences, device=self.device)
        self._top_p = torch.ones(max_sequences, device=self.device)
        self._is_finite = torch.ones(max_sequences, dtype=torch.bool, device=self.device)
        self._kv_of: dict[int, SequenceKV] = {}  # by buffer index
        self._guess_sources: dict[int, list[int]] = {}
        parameters = sum(weight.numel() for weight in model.parameters())
        self._decode_threads = 1 if self.device.type == "cpu" and parameters <= ONE_THREAD_UP_TO else None
        self._batch_sizes = (
            BATCH_SIZES if self.decode_tile_height is None else (*self._invariant_tile_heights(), DECODE_TILE_HEIGHT)
        )

    @torch.inference_mode()
    def prefill(self, groups: list[PromptGroup]) -> None:
        """Run the prompts and sample the first token of every sequence."""
        for group in groups:
            for sequence in group.sequences:
                self._fill_buffers(sequence)
        prompts = [group.request.prompt_ids for group in groups]
        lengths = [len(prompt) for prompt in prompts]
        size = padded(sum(lengths), self.prefill_tile_height)
        tokens = self._to_device(_pad([token for prompt in prompts for token in prompt], size))
        positions = torch.cat([_prompt_positions(group.request) for group in groups])
        positions = F.pad(positions, (0, 0, 0, size - len(positions))).to(self.device, non_blocking=True)
        slots = [slot for group in groups for slot in self._prompt_slots(group.sequences[0])]
        attention = PrefillAttention(self.kv, lengths, self._to_device(slots))
        batch = PlannerBatch(self.rotary.at(positions, self.dtype), attention, self.prefill_tile_height)
        hidden = self.model(tokens, batch)
        self._share_last_block(groups)
        sequences = [sequence for group in groups for sequence in group.sequences]
        last = [end - 1 for end, group in zip(accumulate(lengths), groups, strict=True) for _ in group.sequences]
        with threads(self._decode_threads):
            rows = hidden[self._to_device(_pad(last, self._padded_batch_size(len(last))))]
            codes, is_finite = self._sample(sequences, [0] * len(last), rows)
        buffers = self._to_device([s.buffer_index for s in sequences])
        self._is_finite[buffers], self._tokens[buffers, 0] = is_finite, codes

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Run the last token of every sequence and guesses after it; sample the tokens that follow."""
        self._guess(sequences)
        owners = [s for s in sequences for _ in range(s.rows)]
        inputs = [s.written - 1 + row for s in sequences for row in range(s.rows)]
        batch_size = self._padded_batch_size(len(owners))
        buffers = self._to_device(_pad([s.buffer_index for s in owners], batch_size))
        steps = self._to_device(_pad(inputs, batch_size))
        slots = self._to_device([self._slot(s, s.prompt_length + step) for s, step in zip(owners, inputs, strict=True)])
        keys_and_values = [self._kv_of[s.buffer_index] for s in sequences]
        lengths, counts = [s.cached for s in sequences], [s.rows for s in sequences]
        with threads(self._decode_threads):
            attention = DecodeAttention(self.kv, keys_and_values, lengths, counts, slots)
            rotary = self.rotary.at(self._positions[buffers, steps], self.dtype)
            batch = PlannerBatch(rotary, attention, self._tile_height(batch_size))
            hidden = self.model(self._tokens[buffers, steps], batch)
            codes, is_finite = self._sample(owners, [step + 1 for step in inputs], hidden)
        self._accept(sequences, buffers[: len(owners)], steps[: len(owners)] + 1, codes, is_finite)

    def read(self, sequence: Sequence) -> list[int]:
        """Return a plan's tokens, undefined from `written` on. Waits for the device.

        Raises:
            NonFiniteError: scores were not finite.
        """
        tokens = self._tokens[sequence.buffer_index, : sequence.total].tolist()
        if not self._is_finite[sequence.buffer_index]:
            raise NonFiniteError("scores of the planner are not finite")
        return tokens

    def measure_passes(self) -> dict[int, float]:
        """Return the seconds of a pass by batch size; nothing where the host does not read its tokens."""
        capacity = min(self.kv.pool.shape[1] * self.kv.block_size, 512)
        if self.decode_tile_height is None or capacity <= 2 * DECODE_TILE_HEIGHT:
            return {}
        request = Request("", JobSpec("", MAX_SIDE, MAX_SIDE, seed=0))
        sequence = Sequence(request.images[0], 1, 0, list(range(capacity // self.kv.block_size)))
        sequence.written = capacity - DECODE_TILE_HEIGHT - 1
        self._kv_of[0] = SequenceKV(self.kv, sequence.blocks)
        self._guess_sources[0] = guess_sources(tuple(request.spec.grids))
        seconds: dict[int, float] = {}
        for sequence.rows in self._batch_sizes:
            seconds[sequence.rows] = _shortest(lambda: self.decode([sequence]))
        return seconds

    def _sample(self, sequences: list[Sequence], steps: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sample token `steps` of a sequence from its row; return codes and whether the row's scores are finite."""
        count = len(sequences)
        buffers, tokens = self._to_device([s.buffer_index for s in sequences]), self._to_device(steps)
        logits = self.model.logits(hidden, self._tile_height(len(hidden)))[:count]
        uniforms, temperature, top_p = self._uniforms[buffers, tokens], self._temperature[buffers], self._top_p[buffers]
        codes = sample(logits, uniforms, temperature, top_p, self.sampling.top_k)
        return codes, (logits - logits).sum(-1) == 0  # a tenth of the time of `isfinite`

    def _guess(self, sequences: list[Sequence]) -> None:
        """Write the tokens that a pass reads and no pass has chosen."""
        copies = [
            (s.buffer_index, token, min(self._guess_sources[s.buffer_index][token], s.written + s.guessed - 1))
            for s in sequences
            for token in range(s.written + s.guessed, s.written + s.rows - 1)
        ]
        if copies:
            buffers, tokens, sources = self._to_device([list(column) for column in zip(*copies, strict=True)])
            self._tokens[buffers, tokens] = self._tokens[buffers, sources]

    def _accept(
        self, sequences: list[Sequence], buffers: Tensor, steps: Tensor, codes: Tensor, is_finite: Tensor
    ) -> None:
        """Write codes [rows] and count those that follow right guesses.

        Without guesses nothing is read from the device.
        """
        if len(codes) == len(sequences):
            self._is_finite[buffers] &= is_finite
            self._tokens[buffers, steps] = codes
            counts = [1] * len(sequences)
        else:
            agrees = (self._tokens[buffers, steps] == codes).tolist()
            self._tokens[buffers, steps] = codes
            counts = self._count_accepted(sequences, agrees, is_finite.tolist())
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.accepted = count

    def _count_accepted(self, sequences: list[Sequence], agrees: list[bool], is_finite: list[bool]) -> list[int]:
        counts: list[int] = []
        start = 0
        for sequence in sequences:
            end = start + sequence.rows
            right = takewhile(bool, agrees[start : end - 1])
            counts.append(1 + sum(right) if all(is_finite[start:end]) else self._reject(sequence))
            start = end
        return counts

    def _reject(self, sequence: Sequence) -> int:
        """Count no token: the next pass runs without guesses, from which infinities may have come."""
        if sequence.rows == 1:
            self._is_finite[sequence.buffer_index] = False
            return 1
        sequence.can_look_ahead = False
        first = sequence.prompt_length + sequence.written
        self.kv.clear(self._to_device([self._slot(sequence, first + row) for row in range(sequence.rows - 1)]))
        return 0

    def _fill_buffers(self, sequence: Sequence) -> None:
        spec, index, total = sequence.request.spec, sequence.buffer_index, sequence.total
        start = int(_prompt_positions(sequence.request)[-1, 0]) + 1  # a prompt ends with a token of text
        grids = [(grid.rows, grid.cols) for grid in spec.grids]
        self._positions[index, :total] = plan_positions(start, grids).to(self.device)
        self._is_finite[index] = True
        self._uniforms[index, :total] = uniforms(sequence.image.seed, total).to(self.device)
        self._temperature[index] = self.sampling.temperature if spec.temperature is None else spec.temperature
        self._top_p[index] = self.sampling.top_p if spec.top_p is None else spec.top_p
        self._kv_of[index] = SequenceKV(self.kv, sequence.blocks)
        first, block_size = sequence.prompt_length // self.kv.block_size, self.kv.block_size
        self.kv.clear(self._to_device([b * block_size + i for b in sequence.blocks[first:] for i in range(block_size)]))
        self._guess_sources[index] = guess_sources(tuple(spec.grids))

    def _share_last_block(self, groups: list[PromptGroup]) -> None:
        """Copy the prompt's partly filled block, in which every plan continues."""
        for group in groups:
            first, *others = group.sequences
            index, remainder = divmod(first.prompt_length, self.kv.block_size)
            for other in others if remainder else []:
                self.kv.copy_block(first.blocks[index], other.blocks[index])

    def _padded_batch_size(self, count: int) -> int:
        return next((size for size in self._batch_sizes if size >= count), padded(count, self.decode_tile_height))

    def _tile_height(self, batch_size: int) -> int | None:
        return None if self.decode_tile_height is None else min(self.decode_tile_height, batch_size)

    @torch.inference_mode()
    def _invariant_tile_heights(self) -> list[int]:
        """Return the `SMALL_TILE_HEIGHTS` that give every row the same bits as `DECODE_TILE_HEIGHT`.

        One try suffices: kernels depend on shapes alone, and attention runs per sequence.
        """
        config = self.model.config
        tokens = torch.arange(DECODE_TILE_HEIGHT) % config.vocab_size
        rotary = self.rotary.at(tokens[:, None].expand(-1, 3), self.dtype)

        def scores(start: int, height: int) -> Tensor:
            tile = slice(start, start + height)
            batch = PlannerBatch((rotary[0][tile], rotary[1][tile]), lambda layer, q, k, v: q, height)
            return self.model.logits(self.model(tokens[tile], batch), height)

        with threads(self._decode_threads):
            expected = scores(0, DECODE_TILE_HEIGHT)
            starts = {height: range(0, DECODE_TILE_HEIGHT, height) for height in SMALL_TILE_HEIGHTS}
            return [
                height
                for height in SMALL_TILE_HEIGHTS
                if all(torch.equal(scores(i, height), expected[i : i + height]) for i in starts[height])
            ]

    def _slot(self, sequence: Sequence, token: int) -> int:
        block_size = self.kv.block_size
        return sequence.blocks[token // block_size] * block_size + token % block_size

    def _prompt_slots(self, sequence: Sequence) -> list[int]:
        return [self._slot(sequence, token) for token in range(sequence.prompt_length)]

    def _to_device(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's threads, unless None: less than a microsecond."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shortest(work: Callable[[], object], repeats: int = 5, most_seconds: float = 0.3) -> float:
    """Return the least seconds of several runs, of fewer after `most_seconds`."""
    shortest, began = float("inf"), time.perf_counter()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        ended = time.perf_counter()
        shortest = min(shortest, ended - started)
        if ended - began > most_seconds:
            break
    return shortest


def _pad(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


def _prompt_positions(request: Request) -> Tensor:
    assert request.prompt_positions is not None
    return request.prompt_positions
