"""Arithmetic that gives a row the same bits in every batch, on CPUs only.

* The kernel and order of sums of MKL's products depend on their rows (float32, K=256: 9 and 600 differ in the last
  bits), so they run on padded tiles of a fixed height.
* SiLU rounds differently in the vector loop and its scalar tail, so every thread's share is whole vectors.

Cost on two cores (float32, 4096 rows, K=256, N=1024): tiles of 256 rows 0-5%, 128 rows 0-15%, 32 rows 40%; and half a
tile of padding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRAIN = 32768  # below it torch uses one thread (at::internal::GRAIN_SIZE)
LANES = 64  # the longest step of a vector loop (two bfloat16 vectors)


class Linear(nn.Linear):
    """`nn.Linear` over [rows, in_features]: no row depends on others."""

    def forward(self, x: Tensor, tile_height: int | None = None) -> Tensor:  # type: ignore[override]
        """Multiply in tiles of `tile_height` rows; None: in one product."""
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
    """Return `height` on CPUs, else None."""
    return height if device.type == "cpu" else None


def padded(rows: int, tile_height: int | None) -> int:
    """Round `rows` up to whole tiles."""
    return rows if tile_height is None else -(-rows // tile_height) * tile_height


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)` of a contiguous x, whatever its positions."""
    if x.device.type != "cpu" or x.shape[0] < 2 or _shares_are_whole_vectors(x.numel()):
        return function(x)
    half = x.shape[0] // 2
    return torch.cat([elementwise(function, x[:half]), elementwise(function, x[half:])])


def _shares_are_whole_vectors(elements: int) -> bool:
    shares = min(torch.get_num_threads(), -(-elements // GRAIN))
    return -(-elements // shares) % LANES == 0
