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
    """`nn.Linear` over [rows, in_features], computed in tiles of `tile_height` rows; None: in one product."""

    def forward(self, x: Tensor, tile_height: int | None = None) -> Tensor:  # type: ignore[override]
        rows = x.shape[0]
        if tile_height is None or rows == tile_height:
            return F.linear(x, self.weight, self.bias)
        assert rows % tile_height == 0, f"{rows} rows are not a multiple of the tile height {tile_height}"
        out = x.new_empty(rows, self.out_features)
        weight = self.weight.t()
        for start in range(0, rows, tile_height):
            tile_in, tile_out = x[start : start + tile_height], out[start : start + tile_height]
            if self.bias is None:
                torch.mm(tile_in, weight, out=tile_out)
            else:
                torch.addmm(self.bias, tile_in, weight, out=tile_out)
        return out


def choose_tile_height(height: int, device: torch.device) -> int | None:
    """Return `height` on a CPU, and None on devices where products run in one piece."""
    return height if device.type == "cpu" else None


def padded(rows: int, tile_height: int | None) -> int:
    """Return `rows` rounded up to whole tiles."""
    return rows if tile_height is None else -(-rows // tile_height) * tile_height


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` of a contiguous x [rows, ...], each element computed the same wherever it lies."""
    if x.device.type != "cpu" or x.shape[0] < 2 or _shares_are_whole_vectors(x.numel()):
        return function(x)
    half = x.shape[0] // 2
    return torch.cat([elementwise(function, x[:half]), elementwise(function, x[half:])])


def _shares_are_whole_vectors(elements: int) -> bool:
    shares = min(torch.get_num_threads(), -(-elements // GRAIN))
    return -(-elements // shares) % LANES == 0
