"""Runs the planner: prompts into a paged cache, then passes over plans. The host reads complete plans."""

import time
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.geometry import MAX_SIDE
from engine.jobs.job import JobSpec
from engine.planner.buffers import SequenceBuffers
from engine.planner.decode_step import DecodeStep
from engine.planner.decoders import batch_sizes, cuda_decoder
from engine.planner.host_decoder import HostDecoder
from engine.planner.passes import Decoder, Pass
from engine.planner.scheduler import PromptGroup, Sequence
from engine.request import Request
from models.batch_invariant import choose_tile_height, padded
from models.device_copies import upload
from models.errors import NonFiniteError
from models.glm_image.config import SamplingDefaults
from models.glm_image.paged_attention import PagedKV, PrefillAttention, PromptChunk, SequenceKV
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable
from models.threads import threads

PREFILL_TILE_HEIGHT = 128
ONE_THREAD_UP_TO = 16_000_000  # parameters: CPU threads would mostly wait


class PlannerRunner:
    """Prefill and decode over a paged cache.

    Args:
        kv: its last block is for padding.
        max_positions: of the longest prompt and largest plan together.
        max_blocks: of the same.
        min_rows: of a pass on a GPU; None: always as many as the most sequences need.
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
        max_blocks: int,
        min_rows: int | None = None,
    ):
        self.model, self.kv, self.sampling = model, kv, sampling
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.rotary = RotaryTable(model.config, max_positions, self.device)
        padding_block = kv.pool.shape[1] - 1
        self.buffers = SequenceBuffers(max_sequences, max_plan_tokens, max_blocks, padding_block, self.device)
        self.step = DecodeStep(model, self.buffers, self.rotary, sampling, kv.block_size)
        self.prefill_tile_height = choose_tile_height(PREFILL_TILE_HEIGHT, self.device)
        parameters = sum(weight.numel() for weight in model.parameters())
        self._decode_threads = 1 if self.device.type == "cpu" and parameters <= ONE_THREAD_UP_TO else None
        self.decoder: Decoder = HostDecoder(self.step, kv, self._decode_threads)
        self.fallbacks: dict[str, str] = {}  # kernels that are not used, and why
        if self.device.type == "cuda":
            sizes = batch_sizes(max_sequences, min_rows)
            with torch.inference_mode():
                decoder, self.fallbacks = cuda_decoder(self.step, kv, sizes, max_blocks * kv.block_size)
            self.decoder = decoder or self.decoder
        self._passes: list[Pass] = []

    @torch.inference_mode()
    def prefill(self, groups: list[PromptGroup]) -> None:
        """Run the next chunks of prompts; sample the first tokens of sequences whose prompt is complete."""
        for group in groups:
            for sequence in group.sequences if not group.start else []:
                self._begin(sequence)
        # On GPUs a product's bits depend on its rows: each prompt runs alone.
        for packed in [groups] if self.prefill_tile_height else [[group] for group in groups]:
            self._prefill(packed)

    def _prefill(self, groups: list[PromptGroup]) -> None:
        lengths = [group.end - group.start for group in groups]
        size = padded(sum(lengths), self.prefill_tile_height)
        tokens = [token for group in groups for token in group.request.prompt_ids[group.start : group.end]]
        positions = torch.cat([_prompt_positions(group.request)[group.start : group.end] for group in groups])
        positions = upload(F.pad(positions, (0, 0, 0, size - len(positions))), self.device)
        slots = [s for g in groups for s in self.kv.slots(g.sequences[0].blocks, range(g.start, g.end))]
        chunks = [PromptChunk(SequenceKV(self.kv, g.sequences[0].blocks), g.start, g.end) for g in groups]
        attention = PrefillAttention(self.kv, chunks, self._to_device(slots))
        batch = PlannerBatch(self.rotary.at(positions, self.dtype), attention, self.prefill_tile_height)
        hidden = self.model(self._to_device(_pad(tokens, size)), batch)
        ends = zip(accumulate(lengths), groups, strict=True)
        complete = [(end - 1, group) for end, group in ends if group.is_last_chunk]
        self._share_last_block([group for _, group in complete])
        if complete:
            sequences = [sequence for _, group in complete for sequence in group.sequences]
            self._choose_first(sequences, hidden, [row for row, group in complete for _ in group.sequences])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Run the last token of every sequence and guesses after it; sample the tokens that follow."""
        self._passes += self.decoder.decode(sequences)

    def take_passes(self) -> list[Pass]:
        """Return the passes that have finished since the last call."""
        passes, self._passes = self._passes, []
        return passes

    def read(self, sequence: Sequence) -> list[int]:
        """Return a plan's tokens, undefined from `written` on. Waits for the device.

        Raises:
            NonFiniteError: scores were not finite.
        """
        tokens = self.buffers.tokens[sequence.buffer_index, : sequence.total].tolist()
        if self.buffers.failures[sequence.buffer_index]:
            raise NonFiniteError("scores of the planner are not finite")
        return tokens

    @torch.inference_mode()
    def measure_passes(self) -> dict[int, float]:
        """Return the seconds of a pass by batch size; nothing where guesses would have to be waited for."""
        capacity = min((self.kv.pool.shape[1] - 1) * self.kv.block_size, 512)
        if not self.decoder.can_look_ahead or capacity <= 2 * self.decoder.batch_sizes[-1]:
            return {}
        request = Request("", JobSpec("", MAX_SIDE, MAX_SIDE, seed=0))
        request.prompt_positions = torch.zeros(1, 3, dtype=torch.long)
        sequence = Sequence(request.images[0], 1, 0, list(range(capacity // self.kv.block_size)))
        self._begin(sequence)
        seconds: dict[int, float] = {}
        for size in self.decoder.batch_sizes:
            sequence.rows, sequence.written = size, capacity - size - 1
            seconds[size] = _shortest(lambda: self._time_pass(sequence))
        return seconds

    def _time_pass(self, sequence: Sequence) -> None:
        self.buffers.progress[:2, sequence.buffer_index] = sequence.written
        self.decoder.decode([sequence])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _choose_first(self, sequences: list[Sequence], hidden: Tensor, last: list[int]) -> None:
        """Sample the first tokens from the hidden states of the prompts' last ones."""
        decoder, count = self.decoder, len(last)
        size = decoder.padded_batch_size(count)
        lines = self._to_device([s.buffer_index for s in sequences] + [self.buffers.padding_line] * (size - count))
        with threads(self._decode_threads):
            rows = hidden[self._to_device(_pad(last, size))]
            codes, is_finite = self.step.choose(rows, lines, torch.zeros_like(lines), decoder.tile_height(size))
        self.step.begin(lines[:count], codes[:count], is_finite[:count])

    def _begin(self, sequence: Sequence) -> None:
        start = int(_prompt_positions(sequence.request)[-1, 0]) + 1  # a prompt ends with a token of text
        self.buffers.fill(sequence, start, self.sampling)
        block_size = self.kv.block_size
        tokens = range(sequence.prompt_length // block_size * block_size, len(sequence.blocks) * block_size)
        self.kv.clear(self._to_device(self.kv.slots(sequence.blocks, tokens)))
        self.decoder.add(sequence)

    def _share_last_block(self, groups: list[PromptGroup]) -> None:
        """Copy the prompt's partly filled block, in which every plan continues."""
        for group in groups:
            first, *others = group.sequences
            index, remainder = divmod(first.prompt_length, self.kv.block_size)
            for other in others if remainder else []:
                self.kv.copy_block(first.blocks[index], other.blocks[index])

    def _to_device(self, values: list[int]) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.long), self.device)


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
