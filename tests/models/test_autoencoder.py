"""Decoding as a whole and in tiles."""

import weakref
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.glm_image.autoencoder import TILE_OVERLAP, Autoencoder, _starts
from models.glm_image.model import GlmImage, build_autoencoder, build_on_meta
from models.glm_image.random_weights import PUBLISHED_AUTOENCODER


@dataclass
class Peak:
    live: int = 0
    bytes: int = 0
    seen: set[int] = field(default_factory=set)


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = Peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, peak = func(*args, **(kwargs or {})), self.peak
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in peak.seen:
                peak.seen.add(storage._cdata)
                peak.live += storage.nbytes()
                peak.bytes = max(peak.bytes, peak.live)
                weakref.finalize(storage, _free, peak, storage._cdata, storage.nbytes())
        return out


def _free(peak: Peak, key: int, size: int) -> None:
    peak.live -= size
    peak.seen.discard(key)


def decoding_bytes(autoencoder: Autoencoder, height: int, width: int) -> int:
    """Return the most bytes that are alive while an image is decoded, on tensors without values."""
    channels = autoencoder.vae.config.latent_channels  # type: ignore[attr-defined]
    latents = torch.empty(channels, height // 8, width // 8, device="meta")
    with Memory() as memory:
        autoencoder.decode(latents)
    return memory.peak.bytes


def on_meta(config: dict[str, Any]) -> Autoencoder:
    vae: Any = build_on_meta(lambda: build_autoencoder(config))
    autoencoder = Autoencoder(vae.to(torch.bfloat16))
    autoencoder._mean, autoencoder._std = autoencoder._mean.to("meta"), autoencoder._std.to("meta")
    return autoencoder


@pytest.mark.parametrize(
    "config", [PUBLISHED_AUTOENCODER, PUBLISHED_AUTOENCODER | {"block_out_channels": [128, 256, 512, 512]}]
)
@pytest.mark.parametrize("side", [512, 2048])
def test_the_memory_of_decoding_is_bounded_closely(config: dict[str, Any], side: int) -> None:
    """Three of the largest activations are alive at once; a fourth of that size is left to cuDNN."""
    autoencoder = on_meta(config)
    measured, estimated = decoding_bytes(autoencoder, side, side), autoencoder.bytes_per_pixel * side**2
    assert 0.5 * estimated < measured < estimated


def test_tiles_need_the_memory_of_one_tile() -> None:
    autoencoder = on_meta(PUBLISHED_AUTOENCODER)
    whole = decoding_bytes(autoencoder, 2048, 2048)
    autoencoder.limit_memory(whole // 2)
    assert decoding_bytes(autoencoder, 2048, 2048) < 0.35 * whole
    assert decoding_bytes(autoencoder, 1024, 1024) < 0.35 * whole, "which is decoded as a whole"


@given(st.integers(8, 256), st.sampled_from((32, 64, 128)))
def test_tiles_cover_the_image_and_overlap(size: int, side: int) -> None:
    starts = _starts(size, side)
    assert starts[0] == 0
    assert starts[-1] + side >= size
    assert starts == sorted(set(starts))
    for start, following in pairwise(starts):
        assert following - start <= side * (1 - TILE_OVERLAP)
    assert len(starts) == 1 or starts[-1] + side == size


@pytest.mark.parametrize(("rows", "cols"), [(40, 40), (32, 80), (33, 64)])
def test_tiles_are_blended_to_nearly_the_same_image(model: GlmImage, rows: int, cols: int) -> None:
    """Normalisation sees a tile alone: values differ a little, everywhere; there is no seam."""
    autoencoder = Autoencoder(model.autoencoder.vae)
    latents = torch.randn(8, rows, cols, generator=torch.Generator().manual_seed(1))
    whole, is_finite = autoencoder.decode(latents)
    assert is_finite
    autoencoder.limit_memory(0)
    tiled, is_finite = autoencoder.decode(latents)
    assert is_finite
    assert tiled.shape == whole.shape == (8 * rows, 8 * cols, 3)
    error = (tiled.float() - whole.float()).abs()
    assert error.mean() < 0.1 * whole.float().std()


def test_an_image_of_one_tile_is_the_same_either_way(model: GlmImage) -> None:
    autoencoder = Autoencoder(model.autoencoder.vae)
    latents = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(1))
    whole, _ = autoencoder.decode(latents)
    autoencoder.limit_memory(0)
    assert (autoencoder.decode(latents)[0].int() - whole.int()).abs().max() <= 1


def test_what_is_not_finite_is_noticed_in_any_tile(model: GlmImage) -> None:
    autoencoder = Autoencoder(model.autoencoder.vae)
    autoencoder.limit_memory(0)
    latents = torch.zeros(8, 40, 40)
    latents[3, 39, 39] = torch.nan
    assert not autoencoder.decode(latents)[1]
