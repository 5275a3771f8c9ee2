"""A plan's length is known, so admission reserves its memory: nothing is preempted or recomputed."""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from engine.batch_limit import BatchLimit
from engine.errors import RequestError
from engine.planner.block_allocator import BlockAllocator
from engine.request import Image, Request

MAX_ROWS = 16  # of a sequence in a pass
FIRST_AGREEMENT = 0.8
AGREEMENT_WEIGHT = 0.05  # of a guess
AGREEMENT_RECOVERY = 0.002  # of a pass without guesses


@dataclass(eq=False)
class Sequence:
    """A plan being written.

    Args:
        buffer_index: line in the runner's buffers.
        blocks: the prompt's, then the plan's.
        written: tokens that are known.
        rows: tokens that the next pass reads.
        agreement: share of guesses that were right, lately.
    """

    image: Image
    prompt_length: int
    buffer_index: int
    blocks: list[int]
    written: int = 0
    rows: int = 1
    agreement: float = FIRST_AGREEMENT
    can_look_ahead: bool = True

    @property
    def request(self) -> Request:
        return self.image.request

    @cached_property
    def total(self) -> int:
        """Return the plan tokens to write."""
        return self.request.spec.image_plan_tokens

    @property
    def cached(self) -> int:
        """Return the cached tokens after the next decode step."""
        return self.prompt_length + self.written

    @property
    def max_rows(self) -> int:
        """Bound the rows of a pass by the plan's end."""
        return min(MAX_ROWS, self.total - self.written) if self.can_look_ahead else 1

    def advance(self, rows: int, written: int) -> int:
        """Take over how far a pass of `rows` came; return the tokens it added."""
        accepted = written - self.written
        for agrees in [1.0] * (accepted - 1) + [0.0] * (0 < accepted < rows):
            self.agreement += AGREEMENT_WEIGHT * (agrees - self.agreement)
        if rows == 1:
            self.agreement += AGREEMENT_RECOVERY * (FIRST_AGREEMENT - self.agreement)
        self.written = written
        return accepted

    @property
    def has_preview(self) -> bool:
        preview, *others = self.request.spec.grids
        return bool(others) and self.written >= preview.tokens

    @property
    def is_complete(self) -> bool:
        return self.written == self.total


@dataclass(eq=False)
class PromptGroup:
    """A request's sequences, whose prompt is prefilled once.

    Args:
        start: prompt tokens that are prefilled.
        end: those after the next step.
    """

    request: Request
    sequences: list[Sequence]
    start: int = 0
    end: int = 0

    @property
    def is_last_chunk(self) -> bool:
        """Return whether the next step gives the first plan tokens."""
        return self.end == len(self.request.prompt_ids)


@dataclass(frozen=True)
class PlannerStep:
    """What to run in one step."""

    prefill: list[PromptGroup] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return sum(group.end - group.start for group in self.prefill)


class PlannerScheduler:
    """Admits requests and schedules every step.

    Args:
        prefill_tokens: limit of a step; one prompt's next chunk always goes.
        chunk_tokens: of a prompt. Part of a plan's arithmetic: it does not depend on the load.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        max_sequences: int,
        max_prompt_tokens: int,
        *,
        prefill_tokens: int = 2048,
        chunk_tokens: int = 2048,
    ):
        self.allocator = BlockAllocator(blocks)
        self.block_size = block_size
        self.max_sequences = max_sequences
        self.max_prompt_tokens = max_prompt_tokens
        self.prefill_limit, self.chunk_tokens = BatchLimit(prefill_tokens), chunk_tokens
        self.decode_limit = BatchLimit(max_sequences)
        self._free_buffers = list(range(max_sequences))[::-1]
        self._reserved: dict[Request, PromptGroup] = {}  # not yet admitted
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
        """Return the plans with reserved memory."""
        groups = (*self._prefill, *self._reserved.values())
        return self._decode + [sequence for group in groups for sequence in group.sequences]

    @property
    def steps_left(self) -> int:
        """Return the steps left for all admitted plans."""
        left = [sequence.total - sequence.written for sequence in self.sequences]
        return max(max(left, default=0), -(-sum(left) // self.decode_limit.current))

    def sequences_with_new_preview(self) -> list[Sequence]:
        """Return sequences whose preview is wanted and written but not set."""
        return [s for s in self._decode if s.request.spec.partial_images and s.image.preview is None and s.has_preview]

    def completed_sequences(self) -> list[Sequence]:
        return [sequence for sequence in self._decode if sequence.is_complete]

    def check(self, request: Request) -> None:
        """Raise RequestError if even an idle stage could not plan it."""
        if request.is_planned:
            return
        self.check_length("prompt", len(request.prompt_ids) - request.source_tokens)
        if self._blocks_needed(request) > self.allocator.total:
            raise RequestError(
                f"{request.spec.n} images of {request.spec.width}x{request.spec.height} with this prompt need "
                f"{self._blocks_needed(request) * self.block_size} tokens of planner memory; this server has "
                f"{self.allocator.total * self.block_size}. Ask for fewer or smaller images",
                param="n" if request.spec.n > 1 else "size",
            )
        if request.spec.n > self.max_sequences:
            raise RequestError(f"this server makes at most {self.max_sequences} images of a request at once", param="n")

    def check_length(self, field: str, tokens: int) -> None:
        """Raise RequestError if a text is too long."""
        if tokens > self.max_prompt_tokens:
            raise RequestError(
                f"the {field} has {tokens} tokens; this server takes at most {self.max_prompt_tokens}",
                param=field,
                code="prompt_too_long",
            )

    def fits(self, request: Request) -> bool:
        """Return whether enough memory is free."""
        unplanned = self._unplanned(request)
        return not unplanned or (self._blocks_needed(request) <= self.allocator.free and unplanned <= self.free_buffers)

    def reserve(self, request: Request) -> None:
        """Reserve memory."""
        sequences: list[Sequence] = []
        prompt_blocks: list[int] = []
        for image in request.images:
            if image.plan is None:
                if sequences:
                    prompt_blocks = self.allocator.share(prompt_blocks)
                else:
                    prompt_blocks = self.allocator.allocate(self._prompt_blocks(request))
                blocks = prompt_blocks + self.allocator.allocate(self._image_blocks(request))
                sequences.append(Sequence(image, len(request.prompt_ids), self._free_buffers.pop(), blocks))
        self._reserved[request] = PromptGroup(request, sequences)

    def admit(self, request: Request) -> None:
        """Schedule a request; reserve memory first unless that is done."""
        if request not in self._reserved:
            self.reserve(request)
        self._prefill.append(self._reserved.pop(request))

    def schedule(self) -> PlannerStep:
        """Return the next step: prompts, or chunks of long ones, within the limit, and all prefilled sequences.

        After memory ran out, only the oldest decode: each gets completed.
        """
        prefill: list[PromptGroup] = []
        tokens, limit = 0, self.prefill_limit.take() if self._prefill else 0
        for group in self._prefill:
            group.end = min(len(group.request.prompt_ids), group.start + self.chunk_tokens)
            tokens += group.end - group.start
            if prefill and tokens > limit:
                break
            prefill.append(group)
        return PlannerStep(prefill, self._decode[: self.decode_limit.take()] if self._decode else [])

    def mark_prefilled(self, group: PromptGroup) -> None:
        """Go on to a prompt's next chunk, or let the group decode: its first tokens are sampled."""
        group.start = group.end
        if not group.is_last_chunk:
            return
        self._prefill.remove(group)
        for sequence in group.sequences:
            sequence.written = 1
            self._decode.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Free a plan's memory."""
        self._decode.remove(sequence)
        self._release(sequence)

    def abort(self, request: Request) -> None:
        """Free what the request holds."""
        groups = [group for group in self._prefill if group.request is request]
        for group in groups:
            self._prefill.remove(group)
        if request in self._reserved:
            groups.append(self._reserved.pop(request))
        for group in groups:
            for sequence in group.sequences:
                self._release(sequence)
        for sequence in [s for s in self._decode if s.request is request]:
            self.finish(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError if memory leaked."""
        self.allocator.check_integrity()
        assert self.free_buffers + len(self.sequences) == self.max_sequences
        assert not self.is_idle or self._reserved or self.allocator.used == 0

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        self._free_buffers.append(sequence.buffer_index)

    def _unplanned(self, request: Request) -> int:
        return sum(image.plan is None for image in request.images)

    def _prompt_blocks(self, request: Request) -> int:
        """Count full blocks, which images share."""
        return len(request.prompt_ids) // self.block_size

    def _image_blocks(self, request: Request) -> int:
        remainder = len(request.prompt_ids) % self.block_size
        return -(-(remainder + request.spec.image_plan_tokens) // self.block_size)

    def _blocks_needed(self, request: Request) -> int:
        return self._prompt_blocks(request) + self._unplanned(request) * self._image_blocks(request)
