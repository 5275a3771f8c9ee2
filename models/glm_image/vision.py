"""Source images to codes, with transformers' networks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from models.errors import NonFiniteError
from models.glm_image.source_images import PreprocessedImage

CHUNK = 1024  # features at once, 4 bytes per code each


class VisionTokenizer(nn.Module):
    """Takes one image at a time."""

    def __init__(self, config: GlmImageConfig):
        super().__init__()
        self.visual = GlmImageVisionModel(config.vision_config)  # pyright: ignore[reportArgumentType]
        self.vqmodel = GlmImageVQVAE(config.vq_config)  # pyright: ignore[reportArgumentType]
        self.settings = config.to_json_string()

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "VisionTokenizer":
        """Build from `vision_language_encoder/config.json`."""
        sizes = {key: dict(config[key]) for key in ("vision_config", "vq_config") if key in config}
        return cls(GlmImageConfig.from_dict(sizes))

    @torch.inference_mode()
    def forward(self, image: PreprocessedImage) -> Tensor:
        """Return codes [rows, cols]. Waits for the device.

        Raises:
            NonFiniteError: none is nearest.
        """
        device = self.vqmodel.quant_conv.weight.device
        grid = torch.tensor([[1, image.rows, image.cols]], device=device)
        features = self.visual(image.halved.to(device), grid_thw=grid).last_hidden_state
        convolution = self.vqmodel.quant_conv
        embeddings = F.linear(features, convolution.weight.flatten(1), convolution.bias)
        if not embeddings.isfinite().all():
            raise NonFiniteError("the features of a source image are not finite")
        codebook = F.normalize(self.vqmodel.quantize.embedding.weight.float(), dim=-1).t()
        # Of unit vectors, the nearest has the largest product.
        nearest = [(F.normalize(part.float(), dim=-1) @ codebook).argmax(-1) for part in embeddings.split(CHUNK)]
        return torch.cat(nearest).view(image.rows, image.cols)


def vision_key(key: str) -> str | None:
    """Map a key of `GlmImageForConditionalGeneration` to `VisionTokenizer`'s, if there is one."""
    name = key.removeprefix("model.")
    return name if name.startswith(("visual.", "vqmodel.")) else None
