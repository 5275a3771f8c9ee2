import sys

import torch
from diffusers import AutoencoderKL
from torch import Tensor

TILE_OVERLAP = 0.25  # of a tile's side
FULL_SIZE_TENSORS = 4  # at once, of the widest at full size: three activations, cuDNN's workspace


class Autoencoder:
    """The VAE, for one image at a time: a batch would gain nothing, and bytes depend on it."""

    def __init__(self, vae: AutoencoderKL):
        if vae.device.type == "cpu":
            vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # a third faster
        self.vae = vae
        self.max_pixels = sys.maxsize  # decoded as a whole
        channels = vae.config.latent_channels  # type: ignore[attr-defined]
        mean, std = vae.config.latents_mean, vae.config.latents_std  # type: ignore[attr-defined]
        self._mean = torch.tensor(mean or [0.0] * channels, dtype=vae.dtype, device=vae.device).view(-1, 1, 1)
        self._std = torch.tensor(std or [1.0] * channels, dtype=vae.dtype, device=vae.device).view(-1, 1, 1)

    @property
    def default_side(self) -> int:
        """Return the checkpoint's image side in pixels."""
        return int(self.vae.config.sample_size)  # type: ignore[attr-defined]

    @property
    def bytes_per_pixel(self) -> int:
        """Return the memory of decoding: 4 kB in the published size."""
        first, *others = self.vae.config.block_out_channels  # type: ignore[attr-defined]
        return FULL_SIZE_TENSORS * (others[0] if others else first) * self.vae.dtype.itemsize

    def limit_memory(self, available: int) -> None:
        """Decode in tiles what needs more."""
        self.max_pixels = available // self.bytes_per_pixel

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode normalised latents [channels, H/8, W/8]: [H, W, 3] uint8, and whether all is finite."""
        scaled = (latents.to(self.vae.dtype) * self._std + self._mean)[None]
        pixels = scaled[0, 0].numel() * self._scale**2
        image = (self._decode(scaled) if pixels <= self.max_pixels else self._decode_tiles(scaled))[0].float()
        rounded = (image * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return rounded.permute(1, 2, 0).contiguous(), image.isfinite().all()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [3, H, W] uint8 as normalised latents (the mode)."""
        image = (pixels.to(self.vae.device).float() / 255 * 2 - 1).to(self.vae.dtype)
        latents = self.vae.encode(image[None]).latent_dist.mode()[0]  # type: ignore[union-attr]
        return (latents - self._mean) / self._std

    @property
    def _scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[attr-defined]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]  # type: ignore[index,return-value]

    def _decode_tiles(self, latents: Tensor) -> Tensor:
        """Blend overlapping squares of the checkpoint's size.

        diffusers' `tiled_decode` launches operations for each blended row and column.
        """
        scale, side = self._scale, self.default_side // self._scale
        height, width = latents.shape[-2:]
        image = latents.new_zeros(1, 3, scale * height, scale * width, dtype=torch.float32)
        total = torch.zeros_like(image[:, :1])
        for top in _starts(height, side):
            for left in _starts(width, side):
                tile = self._decode(latents[..., top : top + side, left : left + side])
                rows, cols = (_ramp(size, int(scale * side * TILE_OVERLAP), tile.device) for size in tile.shape[-2:])
                weight = rows[:, None] * cols
                at = (..., slice(scale * top, scale * top + len(rows)), slice(scale * left, scale * left + len(cols)))
                image[at] += weight * tile
                total[at] += weight
        return image / total


def _starts(size: int, side: int) -> list[int]:
    """Return where tiles begin, evenly."""
    step = int(side * (1 - TILE_OVERLAP))
    count = max(0, -(-(size - side) // step))
    return [round(index * (size - side) / count) for index in range(count)] + [max(0, size - side)]


def _ramp(size: int, blend: int, device: torch.device) -> Tensor:
    """Return weights that rise from both ends."""
    position = torch.arange(size, device=device)
    return (torch.minimum(position, size - 1 - position) + 1).clamp(max=blend) / blend
