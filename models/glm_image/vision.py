"""The vision tokenizer: from a picture to the codes that a plan of it would have."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmImageConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

from models.glm_image.source_images import PreprocessedImage

ROWS_AT_ONCE = 1024  # compared with the whole codebook; each takes 4 bytes a code


class VisionTokenizer(nn.Module):
    """transformers' vision transformer and codebook, one picture at a time: its codes depend on nothing else."""

    def __init__(self, config: GlmImageConfig):
        super().__init__()
        self.visual = GlmImageVisionModel(config.vision_config)  # pyright: ignore[reportArgumentType]
        self.vqmodel = GlmImageVQVAE(config.vq_config)  # pyright: ignore[reportArgumentType]
        self.settings = config.to_json_string()

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "VisionTokenizer":
        """Without weights; `config` is `vision_language_encoder/config.json`, of which the sizes of these two count."""
        sizes = {key: dict(config[key]) for key in ("vision_config", "vq_config") if key in config}
        return cls(GlmImageConfig.from_dict(sizes))

    @torch.inference_mode()
    def forward(self, picture: PreprocessedImage) -> Tensor:
        """Codes [rows, cols], on the device."""
        device = self.vqmodel.quant_conv.weight.device
        grid = torch.tensor([[1, picture.rows, picture.cols]], device=device)
        features = self.visual(picture.halved.to(device), grid_thw=grid).last_hidden_state
        convolution = self.vqmodel.quant_conv
        found = F.linear(features, convolution.weight.flatten(1), convolution.bias)
        codebook = F.normalize(self.vqmodel.quantize.embedding.weight.float(), dim=-1).t()
        # Of unit vectors the nearest is the one with the largest cosine.
        nearest = [(F.normalize(part.float(), dim=-1) @ codebook).argmax(-1) for part in found.split(ROWS_AT_ONCE)]
        return torch.cat(nearest).view(picture.rows, picture.cols)


def vision_key(key: str) -> str | None:
    """A key of `GlmImageForConditionalGeneration` -> one of a `VisionTokenizer`; None for the rest."""
    name = key.removeprefix("model.")
    return name if name.startswith(("visual.", "vqmodel.")) else None
