"""Paged attention of decode rows under Triton's interpreter (run by `test_interpreted.py`)."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.glm_image.kernels import reference
from models.glm_image.kernels.paged_decode import PagedDecode
from tests.kernels import INTERPRETED

SHAPES = [(2, 1, 16), (2, 2, 64), (1, 4, 32), (2, 8, 16), (2, 16, 128), (1, 3, 16), (1, 24, 16)]  # G, group, D
MAX_LENGTH = 600
BOUNDARIES = (1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, MAX_LENGTH)


@dataclass(frozen=True, repr=False)
class Batch:
    """Rows and the cache they read; what no row sees is not a number."""

    pool: Tensor
    q: Tensor
    tables: Tensor
    row_sequence: Tensor
    lengths: Tensor

    def __repr__(self) -> str:
        shapes = tuple(self.q.shape), tuple(self.pool.shape)
        return f"Batch(q and pool {shapes}, sequences {self.row_sequence.tolist()}, lengths {self.lengths.tolist()})"

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.pool.shape[4]

    def attend(self, max_length: int = MAX_LENGTH, kernel: type[PagedDecode] = PagedDecode) -> Tensor:
        attention = kernel(self.pool, self.group, max_length, len(self.q))
        return attention(1, self.q, self.tables, self.row_sequence, self.lengths)

    def alone(self, row: int, seed: int) -> "Batch":
        """Return one row, whose sequence is in other blocks of another pool."""
        _, _, page, *sizes = self.pool.shape
        length = int(self.lengths[row])
        used = self.tables[self.row_sequence[row], : -(-length // page)].long()
        pool = torch.full((2, 2 * len(used) + 1, page, *sizes), torch.nan, dtype=self.pool.dtype)
        table = torch.tensor(random.Random(seed).sample(range(len(pool[0])), len(used)), dtype=torch.int32)
        pool[:, table.long()] = self.pool[:, used]
        pool[:, table[-1].long(), (length - 1) % page + 1 :] = torch.nan  # seen by longer rows of the sequence
        tables = torch.stack([table.flip(0), table])
        return Batch(pool, self.q[row : row + 1], tables, torch.ones(1, dtype=torch.int32), self.lengths[row : row + 1])


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Batch:
    """Draw sequences, each with one row or several of consecutive lengths."""
    groups, group, head_dim = draw(st.sampled_from(SHAPES))
    page = draw(st.sampled_from((16, 32)))
    length = st.one_of(st.sampled_from(BOUNDARIES), st.integers(1, MAX_LENGTH))
    lasts = draw(st.lists(st.tuples(length, st.integers(1, 3)), min_size=1, max_size=3))
    rows = [(i, n) for i, (last, count) in enumerate(lasts) for n in range(max(1, last - count + 1), last + 1)]
    rows = draw(st.permutations(rows))
    chance = random.Random(draw(st.integers(0, 2**32)))
    torch.manual_seed(chance.getrandbits(32))
    width = -(-MAX_LENGTH // page)
    blocks = width * len(lasts) + 3
    pool = torch.full((2, blocks, page, 2, groups, head_dim), torch.nan, dtype=dtype)
    tables = torch.tensor(chance.sample(range(blocks), width * len(lasts)), dtype=torch.int32).view(-1, width)
    for table, (last, _) in zip(tables.long(), lasts, strict=True):
        token = torch.arange(last)
        pool[:, table[token // page], token % page] = torch.randn(2, last, 2, groups, head_dim).to(dtype)
    q = 3 * torch.randn(len(rows), groups * group, head_dim)
    sequence, lengths = torch.tensor(rows, dtype=torch.int32).unbind(1)
    return Batch(pool, q.to(dtype), tables, sequence.contiguous(), lengths.contiguous())


def expected(batch: Batch) -> Tensor:
    """Compute in float64, from the visible tokens alone."""
    out: list[Tensor] = []
    for q, sequence, length in zip(batch.q, batch.row_sequence, batch.lengths, strict=True):
        tokens = batch.pool[1, batch.tables[sequence].long()].flatten(0, 1)[:length].double()
        k, v = tokens.repeat_interleave(batch.group, 2).unbind(1)
        weights = torch.einsum("hd,lhd->hl", q.double(), k).div(q.shape[-1] ** 0.5).softmax(-1)
        out.append(torch.einsum("hl,lhd->hd", weights, v))
    return torch.stack(out)


@settings(INTERPRETED, max_examples=6)
@given(batches())
def test_agrees_with_float64(batch: Batch) -> None:
    attended, in_float64 = batch.attend(), expected(batch)
    torch.testing.assert_close(attended.double(), in_float64, atol=1e-5, rtol=0)
    finite = Batch(batch.pool.nan_to_num(), batch.q, batch.tables, batch.row_sequence, batch.lengths)
    by_torch = finite.attend(kernel=reference.PagedDecode)  # type: ignore[arg-type]
    torch.testing.assert_close(by_torch.double(), in_float64, atol=1e-5, rtol=0)


@settings(INTERPRETED, max_examples=4)
@given(batches(torch.bfloat16))
def test_bfloat16_is_rounded_once(batch: Batch) -> None:
    """Compare within a bit: the interpreter cuts off where a GPU rounds, and multiplies in float32."""
    torch.testing.assert_close(batch.attend().double(), expected(batch), atol=1e-5, rtol=2**-7)


@settings(INTERPRETED, max_examples=6)
@given(batches(), st.integers(0, 2**32), st.sampled_from((MAX_LENGTH, 1024, 4352)))
def test_a_row_has_the_same_bits_alone(batch: Batch, seed: int, max_length: int) -> None:
    """Run a row in another pool, with other blocks, splits, table and neighbours."""
    row = seed % len(batch.q)
    assert torch.equal(batch.alone(row, seed).attend(max_length)[0], batch.attend()[row])


def test_partial_results_of_earlier_steps_are_not_read() -> None:
    torch.manual_seed(0)
    pool = torch.randn(1, 40, 16, 2, 1, 16)
    tables = torch.arange(40, dtype=torch.int32)[None]
    rows = torch.zeros(2, dtype=torch.int32)
    attend = PagedDecode(pool, 2, 640, 2)
    q = torch.randn(2, 2, 16)
    short, long = torch.tensor([5, 256], dtype=torch.int32), torch.tensor([640, 639], dtype=torch.int32)
    first = attend(0, q, tables, rows, short)
    attend(0, q, tables, rows, long)
    assert torch.equal(attend(0, q, tables, rows, short), first)


def test_more_rows_than_the_buffers_hold_are_refused() -> None:
    attend = PagedDecode(torch.zeros(1, 1, 16, 2, 1, 16), 1, 16, 2)
    rows = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="3 rows are more than the 2"):
        attend(0, torch.zeros(3, 1, 16), torch.zeros(1, 1, dtype=torch.int32), rows, rows + 1)


@pytest.mark.parametrize(("head_dim", "dtype"), [(24, torch.float32), (8, torch.float32), (16, torch.float64)])
def test_other_shapes_are_refused(head_dim: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="is expected, not"):
        PagedDecode(torch.zeros(1, 1, 16, 2, 1, head_dim, dtype=dtype), 1, 16, 1)
