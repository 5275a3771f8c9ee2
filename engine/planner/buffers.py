"""What planner passes read of every plan, on the device."""

from functools import lru_cache

import torch
from torch import Tensor

from engine.geometry import Grid
from engine.planner.lookahead import guess_sources
from engine.planner.sampler import uniforms
from engine.planner.scheduler import Sequence
from models.device_copies import upload
from models.glm_image.config import SamplingDefaults
from models.glm_image.planner import plan_positions


class SequenceBuffers:
    """A line per plan, and a last one for padding.

    The first `written` tokens are final, those up to `chosen` are what passes chose after a wrong guess.

    Args:
        max_blocks: of a prompt and its plan.
        padding_block: cache block that padding rows write to.
    """

    def __init__(
        self, max_sequences: int, max_plan_tokens: int, max_blocks: int, padding_block: int, device: torch.device
    ):
        lines = max_sequences + 1
        self.device, self.padding_line = device, max_sequences
        self.tokens = torch.zeros(lines, max_plan_tokens, dtype=torch.long, device=device)
        self.guess_sources = torch.zeros(lines, max_plan_tokens, dtype=torch.long, device=device)
        self.guesses = torch.full_like(self.tokens, -1)  # codes; -1: that of `guess_sources`
        self.uniforms = torch.zeros(lines, max_plan_tokens, device=device)
        self.positions = torch.zeros(lines, max_plan_tokens, 3, dtype=torch.long, device=device)
        self.blocks = torch.full((lines, max_blocks), padding_block, dtype=torch.int32, device=device)
        self.prompt_lengths, self.totals = (torch.zeros(lines, dtype=torch.long, device=device) for _ in range(2))
        self.temperature, self.top_p = torch.zeros(lines, device=device), torch.ones(lines, device=device)
        self.progress = torch.zeros(3, lines, dtype=torch.long, device=device)
        self.written, self.chosen, self.failures = self.progress
        self._of_grids = lru_cache(64)(self._positions_and_sources)

    def fill(self, sequence: Sequence, start: int, sampling: SamplingDefaults) -> None:
        """Write what passes need of a plan, whose positions begin at `start`."""
        spec, line, total = sequence.request.spec, sequence.buffer_index, sequence.total
        positions, sources = self._of_grids(tuple(spec.grids))
        self.positions[line, :total] = positions + start
        self.guess_sources[line, :total] = sources
        self.uniforms[line, :total] = upload(uniforms(sequence.image.seed, total), self.device)
        self.temperature[line] = sampling.temperature if spec.temperature is None else spec.temperature
        self.top_p[line] = sampling.top_p if spec.top_p is None else spec.top_p
        blocks = upload(torch.tensor(sequence.blocks, dtype=torch.int32), self.device)
        self.blocks[line, : len(blocks)] = blocks
        self.prompt_lengths[line], self.totals[line] = sequence.prompt_length, total
        self.progress[:, line] = 0
        self.guesses[line] = -1
        if sequence.request.encoded:
            self._guess_source(sequence)

    def _guess_source(self, sequence: Sequence) -> None:
        """Guess the code of an edit's first source image where it differs from the one that is guessed from.

        Elsewhere an edit changes both, or none.
        """
        codes, [grid] = sequence.request.encoded[0].codes, sequence.request.spec.grids
        rows, cols = (
            ((2 * torch.arange(count) + 1) * size // (2 * count)).to(codes.device)
            for count, size in zip((grid.rows, grid.cols), codes.shape, strict=True)
        )
        line, total = sequence.buffer_index, grid.tokens
        kept = codes[rows[:, None], cols].flatten()
        self.guesses[line, :total] = kept.masked_fill(kept == kept[self.guess_sources[line, :total]], -1)

    def _positions_and_sources(self, grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor]:
        positions = plan_positions(0, [(grid.rows, grid.cols) for grid in grids])
        return positions.to(self.device), torch.tensor(guess_sources(grids)).to(self.device)
