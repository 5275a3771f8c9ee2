"""Decides which prompts are prefilled and which sequences decode in a step.

A plan's length is known before it is written, so a sequence's memory is reserved to the block when it is admitted:
nothing is ever preempted, recomputed, or out of memory half way.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from engine.batch_limit import BatchLimit
from engine.errors import RequestError
from engine.planner.block_allocator import BlockAllocator
from engine.request import Image, Request


@dataclass(eq=False)
class Sequence:
    """The plan of one image being written.

    Args:
        buffer_index: its line in the runner's buffers.
        blocks: the prompt's blocks, then its own, enough for the whole plan.
    """

    image: Image
    prompt_length: int
    buffer_index: int
    blocks: list[int]
    written: int = 0  # plan tokens chosen so far

    @property
    def request(self) -> Request:
        return self.image.request

    @cached_property
    def total(self) -> int:
        """Tokens of the whole plan."""
        return self.request.spec.image_plan_tokens

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache once the last chosen token has gone through the model."""
        return self.prompt_length + self.written

    @property
    def has_preview(self) -> bool:
        """Whether the first of several grids has been written."""
        preview, *others = self.request.spec.grids
        return bool(others) and self.written >= preview.tokens

    @property
    def is_complete(self) -> bool:
        return self.written == self.total


@dataclass(eq=False)
class PromptGroup:
    """The sequences of one request; its prompt is prefilled once, into the first sequence's blocks."""

    request: Request
    sequences: list[Sequence]


@dataclass(frozen=True)
class PlannerStep:
    """What the runner is to do: prefill these prompts, then advance these sequences by one token."""

    prefill: list[PromptGroup] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(group.request.prompt_ids) for group in self.prefill)


class PlannerScheduler:
    """Admission and step-by-step scheduling of plans.

    Args:
        blocks, block_size: the key/value cache.
        max_sequences: sequences that can be planned at once.
        max_prompt_tokens: a longer prompt is refused; codes of pictures to edit do not count.
        prefill_tokens: prompt tokens to prefill in a step, at most (one prompt always goes through).
    """

    def __init__(
        self, blocks: int, block_size: int, max_sequences: int, max_prompt_tokens: int, prefill_tokens: int = 2048
    ):
        self.allocator = BlockAllocator(blocks)
        self.block_size = block_size
        self.max_sequences = max_sequences
        self.max_prompt_tokens = max_prompt_tokens
        self.prefill_budget = BatchLimit(prefill_tokens)
        self.decode_budget = BatchLimit(max_sequences)
        self._free_buffers = list(range(max_sequences))[::-1]
        self._prefill: deque[PromptGroup] = deque()
        self._decode: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self._prefill and not self._decode

    @property
    def free_buffers(self) -> int:
        return len(self._free_buffers)

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence under way, prefilled or not."""
        return self._decode + [sequence for group in self._prefill for sequence in group.sequences]

    @property
    def steps_left(self) -> int:
        """Steps until every plan under way is written."""
        left = [sequence.total - sequence.written for sequence in self.sequences]
        return max(max(left, default=0), -(-sum(left) // self.decode_budget.current))

    def sequences_with_new_preview(self) -> list[Sequence]:
        """Sequences whose preview has been written and is to be shown, but is not known to their images yet."""
        return [s for s in self._decode if s.request.spec.partial_images and s.image.preview is None and s.has_preview]

    def completed_sequences(self) -> list[Sequence]:
        """Sequences whose last token has been chosen."""
        return [sequence for sequence in self._decode if sequence.is_complete]

    def check(self, request: Request) -> None:
        """Raises RequestError if the request could not be planned even by an idle engine."""
        if request.is_planned:
            return
        prompt = len(request.prompt_ids) - request.source_tokens
        if prompt > self.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt} tokens; this server takes at most {self.max_prompt_tokens}",
                param="prompt",
                code="prompt_too_long",
            )
        if self._blocks_needed(request) > self.allocator.total:
            raise RequestError(
                f"{request.spec.n} images of {request.spec.width}x{request.spec.height} with this prompt need "
                f"{self._blocks_needed(request) * self.block_size} tokens of planner memory; this server has "
                f"{self.allocator.total * self.block_size}. Ask for fewer or smaller images",
                param="n" if request.spec.n > 1 else "size",
            )
        if request.spec.n > self.max_sequences:
            raise RequestError(f"this server makes at most {self.max_sequences} images of a request at once", param="n")

    def fits(self, request: Request) -> bool:
        """Whether the whole request can be reserved now."""
        unplanned = self._unplanned(request)
        return not unplanned or (self._blocks_needed(request) <= self.allocator.free and unplanned <= self.free_buffers)

    def add(self, request: Request) -> None:
        """Reserve everything the request's plans will need."""
        prompt = len(request.prompt_ids)
        shared: list[int] = []
        sequences = []
        for image in request.images:
            if image.plan is None:
                first = not sequences
                whole = self.allocator.allocate(self._prompt_blocks(request)) if first else self.allocator.share(shared)
                own = self.allocator.allocate(self._own_blocks(request))
                shared = whole if first else shared
                sequences.append(Sequence(image, prompt, self._free_buffers.pop(), whole + own))
        self._prefill.append(PromptGroup(request, sequences))

    def schedule(self) -> PlannerStep:
        """The next step: as many waiting prompts as the budget allows, and every sequence that is under way, unless
        memory is short: then those that came first, so that each is written in the end."""
        prefill: list[PromptGroup] = []
        tokens, budget = 0, self.prefill_budget.take() if self._prefill else 0
        for group in self._prefill:
            tokens += len(group.request.prompt_ids)
            if prefill and tokens > budget:
                break
            prefill.append(group)
        return PlannerStep(prefill, self._decode[: self.decode_budget.take()] if self._decode else [])

    def mark_prefilled(self, group: PromptGroup) -> None:
        """The runner has prefilled the group's prompt and chosen the first token of each sequence."""
        self._prefill.remove(group)
        for sequence in group.sequences:
            sequence.written = 1
            self._decode.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The plan is complete and has been read: give its memory back."""
        self._decode.remove(sequence)
        self._release(sequence)

    def abort(self, request: Request) -> None:
        """Give back everything the request holds; harmless if it holds nothing."""
        for group in [g for g in self._prefill if g.request is request]:
            self._prefill.remove(group)
            for sequence in group.sequences:
                self._release(sequence)
        for sequence in [s for s in self._decode if s.request is request]:
            self.finish(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks or buffers leaked; an idle scheduler holds none."""
        self.allocator.check_integrity()
        assert self.free_buffers + len(self.sequences) == self.max_sequences
        assert not self.is_idle or self.allocator.used == 0

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        self._free_buffers.append(sequence.buffer_index)

    def _unplanned(self, request: Request) -> int:
        return sum(image.plan is None for image in request.images)

    def _prompt_blocks(self, request: Request) -> int:
        """Blocks the prompt fills to the brim; these are shared by the request's images."""
        return len(request.prompt_ids) // self.block_size

    def _own_blocks(self, request: Request) -> int:
        """Blocks of one image: the prompt's remainder and the plan."""
        remainder = len(request.prompt_ids) % self.block_size
        return -(-(remainder + request.spec.image_plan_tokens) // self.block_size)

    def _blocks_needed(self, request: Request) -> int:
        return self._prompt_blocks(request) + self._unplanned(request) * self._own_blocks(request)
