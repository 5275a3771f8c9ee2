"""Builds the planner's tensors and runs it. What it runs is the scheduler's decision.

Tokens stay on the device: a step reads the last token of every sequence from a buffer and writes the next one there.
The host learns a plan only when it is complete.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.planner.sampler import sample, uniforms
from engine.planner.scheduler import PromptGroup, Sequence
from engine.request import Request
from models.batch_invariant import choose_tile_height, padded
from models.glm_image.config import SamplingDefaults
from models.glm_image.paged_attention import BlockTable, DecodeAttention, PagedKV, PrefillAttention
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable, plan_positions

DECODE_ROWS = 16  # rows of a decode step's matrix products on CPU; more sequences take more blocks
FEWER_ROWS = (4, 8)  # for fewer sequences, where that changes no bit of a row
PREFILL_ROWS = 128
ONE_THREAD_UP_TO = 16_000_000  # parameters: threads of a CPU would wait for each other longer than they compute
DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # batch sizes elsewhere: each can be captured once


class PlannerRunner:
    """Prefill and decode over a paged cache.

    Args:
        max_sequences: sequences under way at once; each has a `buffer_index` in the buffers.
        max_plan_tokens: tokens of the largest plan.
        max_positions: positions of the longest prompt and the largest plan together.
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
        self.decode_tile_height = choose_tile_height(DECODE_ROWS, self.device)
        self.prefill_tile_height = choose_tile_height(PREFILL_ROWS, self.device)
        self._tokens = torch.zeros(max_sequences, max_plan_tokens, dtype=torch.long, device=self.device)
        self._uniforms = torch.zeros(max_sequences, max_plan_tokens, device=self.device)
        self._positions = torch.zeros(max_sequences, max_plan_tokens, 3, dtype=torch.long, device=self.device)
        self._temperature = torch.zeros(max_sequences, device=self.device)
        self._top_p = torch.ones(max_sequences, device=self.device)
        self._tables: dict[int, BlockTable] = {}  # by buffer index
        parameters = sum(weight.numel() for weight in model.parameters())
        self._decode_threads = 1 if self.device.type == "cpu" and parameters <= ONE_THREAD_UP_TO else None
        self._decode_sizes = DECODE_SIZES if self.decode_tile_height is None else (*self._agreeing_sizes(), DECODE_ROWS)

    @torch.inference_mode()
    def prefill(self, groups: list[PromptGroup]) -> None:
        """Run the prompts and choose the first token of every sequence."""
        for group in groups:
            for sequence in group.sequences:
                self._fill_buffers(sequence)
        prompts = [group.request.prompt_ids for group in groups]
        lengths = [len(prompt) for prompt in prompts]
        rows = padded(sum(lengths), self.prefill_tile_height)
        tokens = self._to_device(_pad([token for prompt in prompts for token in prompt], rows))
        positions = torch.cat([_prompt_positions(group.request) for group in groups])
        positions = F.pad(positions, (0, 0, 0, rows - len(positions))).to(self.device, non_blocking=True)
        places = [p for group in groups for p in _places(group.sequences[0], self.kv.block_size)]
        attention = PrefillAttention(self.kv, lengths, self._to_device(places))
        batch = PlannerBatch(self.rotary.at(positions, self.dtype), attention, self.prefill_tile_height)
        hidden = self.model(tokens, batch)
        self._share_last_block(groups)
        sequences = [sequence for group in groups for sequence in group.sequences]
        last = [end - 1 for end, group in zip(accumulate(lengths), groups, strict=True) for _ in group.sequences]
        with threads(self._decode_threads):
            self._choose(sequences, hidden[self._to_device(_pad(last, self._decode_rows(len(last))))])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Run the last token of every sequence and choose the next."""
        rows = self._decode_rows(len(sequences))
        buffers = self._to_device(_pad([s.buffer_index for s in sequences], rows))
        steps = self._to_device(_pad([s.written - 1 for s in sequences], rows))
        lengths = [s.cached for s in sequences]
        places = [_place(s, length - 1, self.kv.block_size) for s, length in zip(sequences, lengths, strict=True)]
        attention = DecodeAttention(
            self.kv, lengths, [self._tables[s.buffer_index] for s in sequences], self._to_device(places)
        )
        rotary = self.rotary.at(self._positions[buffers, steps], self.dtype)
        batch = PlannerBatch(rotary, attention, self._tile_height(rows))
        with threads(self._decode_threads):
            hidden = self.model(self._tokens[buffers, steps], batch)
            self._choose(sequences, hidden)

    def read(self, sequence: Sequence) -> list[int]:
        """The tokens of a plan, grid by grid; from number `written` on they mean nothing. Waits for the device."""
        return self._tokens[sequence.buffer_index, : sequence.total].tolist()

    def _choose(self, sequences: list[Sequence], hidden: Tensor) -> None:
        """Choose token number `written` of every sequence from its row of `hidden`; the other rows are padding."""
        count = len(sequences)
        buffers = self._to_device([s.buffer_index for s in sequences])
        steps = self._to_device([s.written for s in sequences])
        logits = self.model.logits(hidden, self._tile_height(len(hidden)))[:count]
        uniforms, temperature, top_p = self._uniforms[buffers, steps], self._temperature[buffers], self._top_p[buffers]
        self._tokens[buffers, steps] = sample(logits, uniforms, temperature, top_p, self.sampling.top_k)

    def _fill_buffers(self, sequence: Sequence) -> None:
        spec, index, total = sequence.request.spec, sequence.buffer_index, sequence.total
        start = int(_prompt_positions(sequence.request)[-1, 0]) + 1  # a prompt ends with a token of text
        grids = [(grid.rows, grid.cols) for grid in spec.grids]
        self._positions[index, :total] = plan_positions(start, grids).to(self.device)
        self._uniforms[index, :total] = uniforms(sequence.image.seed, total).to(self.device)
        self._temperature[index] = self.sampling.temperature if spec.temperature is None else spec.temperature
        self._top_p[index] = self.sampling.top_p if spec.top_p is None else spec.top_p
        self._tables[index] = self.kv.table(sequence.blocks)

    def _share_last_block(self, groups: list[PromptGroup]) -> None:
        """Copy the prompt's half-full last block to the other images of a request, which go on writing in it."""
        for group in groups:
            first, *others = group.sequences
            number, remainder = divmod(first.prompt_length, self.kv.block_size)
            for other in others if remainder else []:
                self.kv.copy_block(first.blocks[number], other.blocks[number])

    def _decode_rows(self, count: int) -> int:
        return next((size for size in self._decode_sizes if size >= count), padded(count, self.decode_tile_height))

    def _tile_height(self, rows: int) -> int | None:
        """Return the tile height of the matrix products of a decode step padded to `rows` sequences."""
        return None if self.decode_tile_height is None else min(self.decode_tile_height, rows)

    @torch.inference_mode()
    def _agreeing_sizes(self) -> list[int]:
        """Those of `FEWER_ROWS` at which every row comes out as it does among `DECODE_ROWS`, to the last bit.

        Which kernels the library takes, and so in which order it adds up, follows from the shapes. So it is enough to
        try once, with any tokens, and without attention, which is each sequence's own anyway.
        """
        config = self.model.config
        tokens = torch.arange(DECODE_ROWS) % config.vocab_size
        rotary = self.rotary.at(tokens[:, None].expand(-1, 3), self.dtype)

        def scores(first: int, rows: int) -> Tensor:
            tile = slice(first, first + rows)
            batch = PlannerBatch((rotary[0][tile], rotary[1][tile]), lambda layer, q, k, v: q, rows)
            return self.model.logits(self.model(tokens[tile], batch), rows)

        with threads(self._decode_threads):
            among_all = scores(0, DECODE_ROWS)
            return [
                rows
                for rows in FEWER_ROWS
                if all(torch.equal(scores(i, rows), among_all[i : i + rows]) for i in range(0, DECODE_ROWS, rows))
            ]

    def _to_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self.device, non_blocking=True)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Computes on so many threads, None: on as many as otherwise. It costs less than a microsecond."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pad(numbers: list[int], length: int) -> list[int]:
    return numbers + [0] * (length - len(numbers))


def _prompt_positions(request: Request) -> Tensor:
    assert request.prompt_positions is not None
    return request.prompt_positions


def _place(sequence: Sequence, token: int, block_size: int) -> int:
    """Where the cache holds a sequence's token."""
    return sequence.blocks[token // block_size] * block_size + token % block_size


def _places(sequence: Sequence, block_size: int) -> list[int]:
    return [_place(sequence, token, block_size) for token in range(sequence.prompt_length)]
