"""Attention of new tokens: the bits of a token depend on its sequence alone."""

import random

import pytest
import torch
from torch import Tensor

from models.glm_image import decode_attention
from models.glm_image.config import PlannerConfig
from models.glm_image.decode_attention import DecodeAttention, is_exact
from models.glm_image.paged_attention import PagedKV, SequenceKV

BLOCK, BLOCKS, LENGTHS = 32, 64, (1, 31, 32, 33, 100, 250, 511, 513, 700)
SHAPES = [(4, 2, 64), (4, 2, 16), (4, 1, 32), (4, 4, 16), (32, 2, 128)]  # query heads, key/value heads, head dimension


def cache(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKV:
    config = PlannerConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, num_hidden_layers=1
    )
    kv = PagedKV(config, BLOCKS, BLOCK, dtype, torch.device("cpu"))
    kv.pool.normal_(generator=torch.Generator().manual_seed(1))
    return kv


def new_tokens(
    shape: tuple[int, int, int], count: int, draw: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k and v."""
    heads, kv_heads, head_dim = shape
    q, k, v = (torch.randn(count, n, head_dim, generator=draw).to(dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v


def attend(kv: PagedKV, batch: list[tuple[list[int], int, Tensor, Tensor, Tensor]], padding: int = 0) -> list[Tensor]:
    """Attend from new tokens q, k, v after `length` others of a sequence with `blocks`; return the result of each."""
    lengths, counts = [length + 1 for _, length, *_ in batch], [len(q) for *_, q, _, _ in batch]
    slots = [
        blocks[token // BLOCK] * BLOCK + token % BLOCK
        for (blocks, length, *_), count in zip(batch, counts, strict=True)
        for token in range(length, length + count)
    ]
    sequences = [SequenceKV(kv, blocks) for blocks, *_ in batch]
    attention = DecodeAttention(kv, sequences, lengths, counts, torch.tensor(slots))
    q, k, v = (torch.cat([part[i] for part in batch]) for i in (2, 3, 4))  # type: ignore[misc]
    q, k, v = (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in (q, k, v))
    out = attention(0, q, k, v)
    assert not out[sum(counts) :].any()
    return list(out[: sum(counts)].split(counts))


def expected(kv: PagedKV, blocks: list[int], length: int, q: Tensor) -> Tensor:
    """Compute the attention of one token in float64."""
    keys, values = kv.pool[0, blocks].flatten(0, 1)[:length].double().repeat_interleave(kv.group, 2).unbind(1)
    weights = torch.einsum("hd,lhd->hl", q.double(), keys).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [True, False])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(
    shape: tuple[int, int, int], dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, rng, draw = cache(*shape, dtype), random.Random(3), torch.Generator().manual_seed(2)
    monkeypatch.setattr(decode_attention, "is_exact", lambda kv: exact and is_exact(kv))
    blocks = list(range(BLOCKS))
    scattered = blocks[32:]
    rng.shuffle(scattered)
    with torch.inference_mode():
        for length in LENGTHS:
            lines = ((blocks[:32], rng.choice([1, 2, 7, 16, 20])), (scattered, rng.choice([1, 3, 9])))
            batch = [(where, length, *new_tokens(shape, count, draw, dtype)) for where, count in lines]
            together = attend(kv, batch, padding=rng.randrange(3))
            for (where, _, q, k, v), results in zip(batch, together, strict=True):
                for i, result in enumerate(results):
                    [[alone]] = attend(kv, [(where, length + i, q[i : i + 1], k[i : i + 1], v[i : i + 1])], padding=3)
                    assert torch.equal(alone, result)
                    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                    close = expected(kv, where, length + i + 1, q[i])
                    torch.testing.assert_close(result.double(), close, atol=tolerance, rtol=tolerance)


def test_what_a_mask_hides_must_be_finite_and_is_after_clear() -> None:
    kv = cache(4, 2, 16, torch.float32)
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    kv.pool[:, [3, 5]] = float("nan")
    kv.clear(torch.cat([torch.arange(block * BLOCK, (block + 1) * BLOCK) for block in (3, 5)]))
    [result] = attend(kv, [([3, 5], 0, q, k, v)])
    torch.testing.assert_close(result[0], v[0].repeat_interleave(2, 0))


def test_several_tokens_of_a_sequence_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the products of 16 tokens within a block, over the next one, and alone."""
    kv, products = cache(4, 2, 64, torch.float32), list[int]()
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*tensors: Tensor, attn_mask: Tensor) -> Tensor:
        products.append(1)
        return real(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(decode_attention, "is_exact", lambda kv: True)
    monkeypatch.setattr(decode_attention.F, "scaled_dot_product_attention", counted)
    for length, count, expected_products in ((64, 16, 1), (56, 16, 2), (64, 1, 1)):
        products.clear()
        attend(kv, [(list(range(4)), length, *new_tokens((4, 2, 64), count, torch.Generator(), torch.float32))])
        assert len(products) == expected_products
