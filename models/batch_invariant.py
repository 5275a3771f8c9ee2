"""Rows that do not know their neighbours.

A served image must not depend, not even in its last bit, on who else is in the batch. Two things on a CPU break that:

* A matrix product may add up a row in another order when there are more or fewer rows: the library picks its kernel by
  the number of rows (float32, K=256: the rows of a product of 9 rows differ in the last bits from those of a product
  of 600). So a product runs on blocks of always the same number of rows; a packed tensor is padded to whole blocks.
  (The planner decodes few sequences in smaller blocks where it has found that to change nothing.)
* Elementwise functions such as SiLU round differently in their vector loop and in its scalar tail, and where a tail
  falls depends on how a tensor is shared out among threads. So a tensor is cut until every share is whole vectors.

What the blocks cost on two cores over one product of 4096 rows (float32, K=256, N=1024): blocks of 256 rows 0-5%, of
128 rows 0-15%, of 32 rows 40%; and the padding, half a block a forward pass.
On CUDA nothing of this is done.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAIN = 32768  # elements below which torch does not share out an elementwise function (at::internal::GRAIN_SIZE)
LANES = 64  # elements of the longest step of torch's vector loops (two bfloat16 vectors)


class Linear(nn.Linear):
    """`nn.Linear` over [rows, in_features], computed in blocks of `block` rows; all at once if `block` is None."""

    def forward(self, x: Tensor, block: int | None = None) -> Tensor:  # type: ignore[override]
        rows = x.shape[0]
        if block is None or rows == block:
            return F.linear(x, self.weight, self.bias)
        assert rows % block == 0, f"{rows} rows are not a multiple of the block of {block}"
        out = x.new_empty(rows, self.out_features)
        weight = self.weight.t()
        for start in range(0, rows, block):
            rows_in, rows_out = x[start : start + block], out[start : start + block]
            if self.bias is None:
                torch.mm(rows_in, weight, out=rows_out)
            else:
                torch.addmm(self.bias, rows_in, weight, out=rows_out)
        return out


def tile_height(rows: int, device: torch.device) -> int | None:
    """`rows` where products must run in blocks, None where they need not."""
    return rows if device.type == "cpu" else None


def padded(rows: int, block: int | None) -> int:
    """`rows` rounded up to whole blocks."""
    return rows if block is None else -(-rows // block) * block


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` of a contiguous x [rows, ...], each element computed the same wherever it lies."""
    if x.device.type != "cpu" or x.shape[0] < 2 or _shares_are_whole_vectors(x.numel()):
        return function(x)
    half = x.shape[0] // 2
    return torch.cat([elementwise(function, x[:half]), elementwise(function, x[half:])])


def _shares_are_whole_vectors(elements: int) -> bool:
    shares = min(torch.get_num_threads(), -(-elements // GRAIN))
    return -(-elements // shares) % LANES == 0
