import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.errors import NonFiniteError


class Autoencoder:
    """The VAE, for one image at a time."""

    def __init__(self, vae: AutoencoderKL):
        if vae.device.type == "cpu":
            vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # a third faster
        self.vae = vae
        channels = vae.config.latent_channels  # type: ignore[attr-defined]
        mean, std = vae.config.latents_mean, vae.config.latents_std  # type: ignore[attr-defined]
        self._mean = torch.tensor(mean or [0.0] * channels, dtype=vae.dtype, device=vae.device).view(-1, 1, 1)
        self._std = torch.tensor(std or [1.0] * channels, dtype=vae.dtype, device=vae.device).view(-1, 1, 1)

    @property
    def default_side(self) -> int:
        """Return the checkpoint's image side in pixels."""
        return int(self.vae.config.sample_size)  # type: ignore[attr-defined]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [channels, H/8, W/8] to [H, W, 3] uint8, on the CPU.

        Raises:
            NonFiniteError: the image is not finite.
        """
        scaled = latents.to(self.vae.dtype) * self._std + self._mean
        image = self.vae.decode(scaled[None], return_dict=False)[0][0].float()  # type: ignore[index]
        is_finite = image.isfinite().all()
        pixels = (image * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
        if not is_finite:  # read with the pixels: no further wait
            raise NonFiniteError("the decoded image is not finite")
        return pixels

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [3, H, W] uint8 as normalised latents (the mode)."""
        image = (pixels.to(self.vae.device).float() / 255 * 2 - 1).to(self.vae.dtype)
        latents = self.vae.encode(image[None]).latent_dist.mode()[0]  # type: ignore[union-attr]
        return (latents - self._mean) / self._std
