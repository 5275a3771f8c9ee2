"""Arithmetic that gives a row the same bits in every batch, on CPUs. On CUDA none of this is applied.

* A matrix product's kernel, and so the order of its sums, depends on the number of rows (float32, K=256: rows of a
  product of 9 differ in the last bits from those of 600). So products run on tiles of a fixed height, and packed
  tensors are padded to whole tiles. `PlannerRunner` decodes in smaller tiles where it finds that no bit changes.
* Elementwise functions such as SiLU round differently in the vector loop and in its scalar tail, whose position depends
  on how threads share a tensor. So a tensor is split until every share is whole vectors.

Cost on two cores, for a product of 4096 rows (float32, K=256, N=1024): tiles of 256 rows 0-5%, of 128 rows 0-15%, of 32
rows 40%; and padding, half a tile per forward pass.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAIN = 32768  # elements below which torch uses one thread (at::internal::GRAIN_SIZE)
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
    """Return `height` on a CPU, None on other devices."""
    return height if device.type == "cpu" else None


def padded(rows: int, tile_height: int | None) -> int:
    """Return `rows` rounded up to whole tiles."""
    return rows if tile_height is None else -(-rows // tile_height) * tile_height


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)` of a contiguous x [rows, ...], independent of an element's position."""
    if x.device.type != "cpu" or x.shape[0] < 2 or _shares_are_whole_vectors(x.numel()):
        return function(x)
    half = x.shape[0] // 2
    return torch.cat([elementwise(function, x[:half]), elementwise(function, x[half:])])


def _shares_are_whole_vectors(elements: int) -> bool:
    shares = min(torch.get_num_threads(), -(-elements // GRAIN))
    return -(-elements // shares) % LANES == 0
