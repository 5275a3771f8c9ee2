"""One pass of the planner, without a read by the host.

A row reads a token and chooses the next one: row 0 of a plan its last written token, further rows guesses after it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.planner.buffers import SequenceBuffers
from engine.planner.sampler import sample
from models.glm_image.config import SamplingDefaults
from models.glm_image.planner import Planner, Rotary, RotaryTable

Network = Callable[[Tensor, Rotary, Tensor, Tensor, Tensor], Tensor]
"""Returns hidden states of tokens [N] at positions, with these cache slots, lines and lengths [N]."""

Sample = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Samples codes from scores [N, V] with uniforms, temperatures and `top_p` [N]."""


class DecodeStep:
    """Reads and advances `buffers`. Dispatches the same operations for any rows, but for those of the network."""

    def __init__(
        self, model: Planner, buffers: SequenceBuffers, rotary: RotaryTable, sampling: SamplingDefaults, block_size: int
    ):
        self.model, self.buffers, self.rotary, self.sampling = model, buffers, rotary, sampling
        self.sample: Sample = partial(sample, top_k=sampling.top_k)
        self._block_size, self._dtype = block_size, model.lm_head.weight.dtype

    def __call__(self, lines: Tensor, rows: Tensor, network: Network, tile_height: int | None) -> Tensor:
        """Run rows [N], a plan's one after another from 0. Return whether their scores are finite [N]."""
        buffers = self.buffers
        steps = buffers.written[lines] - 1 + rows  # the tokens that are read
        is_over = steps + 1 >= buffers.totals[lines]  # padding is, too
        lines, steps = lines.masked_fill(is_over, buffers.padding_line), steps.masked_fill(is_over, 0)
        tokens = self._tokens(lines, steps)
        places = buffers.prompt_lengths[lines] + steps
        blocks = buffers.blocks[lines, places // self._block_size].long()
        slots = blocks * self._block_size + places % self._block_size
        rotary = self.rotary.at(buffers.positions[lines, steps], self._dtype)
        hidden = network(tokens, rotary, slots, lines.int(), (places + 1).int())
        codes, is_finite = self.choose(hidden, lines, steps + 1, tile_height)
        self._accept(lines, rows, steps, codes, (codes == tokens.roll(-1)) & is_finite, is_finite, is_over)
        return is_finite

    def choose(self, hidden: Tensor, lines: Tensor, steps: Tensor, tile_height: int | None) -> tuple[Tensor, Tensor]:
        """Choose plan tokens `steps` from hidden states [N, C]; return them and whether scores are finite."""
        buffers = self.buffers
        logits = self.model.logits(hidden, tile_height)
        temperature, top_p = buffers.temperature[lines], buffers.top_p[lines]
        codes = self.sample(logits, buffers.uniforms[lines, steps], temperature, top_p)
        return codes, (logits - logits).sum(-1) == 0  # a tenth of the time of `isfinite`

    def begin(self, lines: Tensor, codes: Tensor, is_finite: Tensor) -> None:
        """Write the first tokens of plans [N]."""
        self.buffers.tokens[lines, 0] = codes
        self.buffers.progress[:, lines] = torch.stack([torch.ones_like(lines), torch.ones_like(lines), ~is_finite])

    def _tokens(self, lines: Tensor, steps: Tensor) -> Tensor:
        """Return chosen tokens, and guesses for those that no pass has chosen."""
        chosen = self.buffers.chosen[lines]
        sources = torch.minimum(self.buffers.guess_sources[lines, steps], chosen - 1).clamp_min(0)
        tokens = self.buffers.tokens[lines, torch.where(steps < chosen, steps, sources)]
        guesses = self.buffers.guesses[lines, steps]
        return torch.where((steps < chosen) | (guesses < 0), tokens, guesses)

    def _accept(
        self,
        lines: Tensor,
        rows: Tensor,
        steps: Tensor,
        codes: Tensor,
        agrees: Tensor,
        is_finite: Tensor,
        is_over: Tensor,
    ) -> None:
        """Count the codes that follow right guesses only.

        `agrees` [N] says whether a row chose the token that the next one read.
        """
        buffers = self.buffers
        wrong = (~agrees).long()
        before = wrong.cumsum(0) - wrong
        first = torch.arange(len(rows), device=rows.device) - rows  # row 0 of the same plan
        accepted = (before == before[first]) & (is_finite | (rows == 0)) & ~is_over
        buffers.tokens[lines, steps + 1] = codes
        buffers.written.index_add_(0, lines, accepted.long())
        buffers.chosen.scatter_reduce_(0, lines, steps + 2, "amax")
        buffers.failures.index_add_(0, lines, (~is_finite & (rows == 0) & ~is_over).long())
