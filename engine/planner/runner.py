"""Builds the planner's tensors and runs it. What it runs is the scheduler's decision.

Tokens stay on the device: a step reads the last token of every sequence from a buffer and writes the next one there.
The host learns a plan only when it is complete.
"""

from itertools import accumulate

import torch
from torch import Tensor

from engine.planner.sampler import sample, uniforms
from engine.planner.scheduler import PromptGroup, Sequence
from models.glm_image.config import SamplingDefaults
from models.glm_image.paged_attention import BlockTable, DecodeAttention, PagedKV, PrefillAttention
from models.glm_image.planner import Planner, RotaryTable, plan_positions
from models.row_blocks import padded, row_block

DECODE_ROWS = 16  # rows of a decode step's matrix products on CPU; more sequences take more blocks
PREFILL_ROWS = 128
DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # batch sizes elsewhere: each can be captured once


class PlannerRunner:
    """Prefill and decode over a paged cache.

    Args:
        slots: sequences under way at once; a slot is a row of the buffers.
        max_plan_tokens: tokens of the largest plan.
        max_positions: positions of the longest prompt and the largest plan together.
    """

    def __init__(
        self,
        model: Planner,
        kv: PagedKV,
        sampling: SamplingDefaults,
        *,
        slots: int,
        max_plan_tokens: int,
        max_positions: int,
    ):
        self.model, self.kv, self.sampling = model, kv, sampling
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.rotary = RotaryTable(model.config, max_positions, self.device)
        self.decode_block = row_block(DECODE_ROWS, self.device)
        self.prefill_block = row_block(PREFILL_ROWS, self.device)
        self._tokens = torch.zeros(slots, max_plan_tokens, dtype=torch.long, device=self.device)
        self._uniforms = torch.zeros(slots, max_plan_tokens, device=self.device)
        self._positions = torch.zeros(slots, max_plan_tokens, 3, dtype=torch.long, device=self.device)
        self._temperature = torch.zeros(slots, device=self.device)
        self._top_p = torch.ones(slots, device=self.device)
        self._tables: dict[int, BlockTable] = {}  # by slot

    @torch.inference_mode()
    def prefill(self, groups: list[PromptGroup]) -> None:
        """Run the prompts and choose the first token of every sequence."""
        for group in groups:
            for sequence in group.sequences:
                self._fill_slot(sequence)
        prompts = [group.request.prompt_ids for group in groups]
        lengths = [len(prompt) for prompt in prompts]
        rows = padded(sum(lengths), self.prefill_block)
        tokens = self._to_device(_pad([token for prompt in prompts for token in prompt], rows))
        positions = self._to_device(_pad([t for length in lengths for t in range(length)], rows))
        places = [p for group in groups for p in _places(group.sequences[0], self.kv.block_size)]
        attention = PrefillAttention(self.kv, lengths, self._to_device(places))
        rotary = self.rotary.at(positions[:, None].expand(-1, 3), self.dtype)
        hidden = self.model(tokens, rotary, attention, self.prefill_block)
        self._share_last_block(groups)
        sequences = [sequence for group in groups for sequence in group.sequences]
        last = [end - 1 for end, group in zip(accumulate(lengths), groups, strict=True) for _ in group.sequences]
        self._choose(sequences, hidden[self._to_device(_pad(last, self._decode_rows(len(last))))])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> None:
        """Run the last token of every sequence and choose the next."""
        rows = self._decode_rows(len(sequences))
        slots = self._to_device(_pad([s.slot for s in sequences], rows))
        steps = self._to_device(_pad([s.written - 1 for s in sequences], rows))
        lengths = [s.cached for s in sequences]
        places = [_place(s, length - 1, self.kv.block_size) for s, length in zip(sequences, lengths, strict=True)]
        attention = DecodeAttention(
            self.kv, lengths, [self._tables[s.slot] for s in sequences], self._to_device(places)
        )
        rotary = self.rotary.at(self._positions[slots, steps], self.dtype)
        hidden = self.model(self._tokens[slots, steps], rotary, attention, self.decode_block)
        self._choose(sequences, hidden)

    def read(self, sequence: Sequence) -> list[int]:
        """The tokens of a complete plan: preview, then plan. Waits for the device."""
        return self._tokens[sequence.slot, : sequence.total].tolist()

    def _choose(self, sequences: list[Sequence], hidden: Tensor) -> None:
        """Choose token number `written` of every sequence from its row of `hidden`; the other rows are padding."""
        count = len(sequences)
        slots = self._to_device([s.slot for s in sequences])
        steps = self._to_device([s.written for s in sequences])
        logits = self.model.logits(hidden, self.decode_block)[:count]
        uniforms, temperature, top_p = self._uniforms[slots, steps], self._temperature[slots], self._top_p[slots]
        self._tokens[slots, steps] = sample(logits, uniforms, temperature, top_p, self.sampling.top_k)

    def _fill_slot(self, sequence: Sequence) -> None:
        spec, geometry, slot = sequence.request.spec, sequence.request.spec.geometry, sequence.slot
        grids = [(geometry.preview.rows, geometry.preview.cols), (geometry.plan.rows, geometry.plan.cols)]
        total = sequence.total
        self._positions[slot, :total] = plan_positions(sequence.prompt_length, grids).to(self.device)
        self._uniforms[slot, :total] = uniforms(sequence.image.seed, total).to(self.device)
        self._temperature[slot] = self.sampling.temperature if spec.temperature is None else spec.temperature
        self._top_p[slot] = self.sampling.top_p if spec.top_p is None else spec.top_p
        self._tables[slot] = self.kv.table(sequence.blocks)

    def _share_last_block(self, groups: list[PromptGroup]) -> None:
        """Copy the prompt's half-full last block to the other images of a request, which go on writing in it."""
        for group in groups:
            first, *others = group.sequences
            number, remainder = divmod(first.prompt_length, self.kv.block_size)
            for other in others if remainder else []:
                self.kv.copy_block(first.blocks[number], other.blocks[number])

    def _decode_rows(self, count: int) -> int:
        if self.decode_block is not None:
            return padded(count, self.decode_block)
        return next((size for size in DECODE_SIZES if size >= count), count)

    def _to_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self.device, non_blocking=True)


def _pad(numbers: list[int], length: int) -> list[int]:
    return numbers + [0] * (length - len(numbers))


def _place(sequence: Sequence, token: int, block_size: int) -> int:
    """Where the cache holds a sequence's token."""
    return sequence.blocks[token // block_size] * block_size + token % block_size


def _places(sequence: Sequence, block_size: int) -> list[int]:
    return [_place(sequence, token, block_size) for token in range(sequence.prompt_length)]
