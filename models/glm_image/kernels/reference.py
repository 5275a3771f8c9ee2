"""The kernels' arithmetic in torch: what a start-up check compares with, and what runs where a kernel does not."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PagedDecode:
    """Attention as `paged_decode.PagedDecode`, over copies of every row's whole table."""

    def __init__(self, pool: Tensor, group: int, max_length: int, max_rows: int):
        self.pool, self.group = pool, group
        self._blocks = -(-max_length // pool.shape[2])

    def __call__(self, layer: int, q: Tensor, tables: Tensor, row_sequence: Tensor, lengths: Tensor) -> Tensor:
        """Attend from q [N, H, D]; what a row does not see must be finite."""
        pages = self.pool[layer][tables[row_sequence, : self._blocks].long()].flatten(1, 2)
        k, v = pages.permute(2, 0, 3, 1, 4)
        is_seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        attended = F.scaled_dot_product_attention(
            q.unflatten(1, (-1, self.group)), k, v, attn_mask=is_seen[:, None, None]
        )
        return attended.flatten(1, 2)
