"""All parts of GLM-Image together, from a checkpoint or with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from models.checkpoint import find_checkpoint, load_weights, randomise
from models.errors import CheckpointError
from models.glm_image.autoencoder import Autoencoder
from models.glm_image.config import (
    PUBLISHED_AUTOENCODER,
    PUBLISHED_GLYPH_ENCODER,
    PUBLISHED_SCHEDULER,
    PlannerConfig,
    RendererConfig,
    RequestDefaults,
    SamplingDefaults,
    read_json,
)
from models.glm_image.planner import Planner
from models.glm_image.prompt import GlyphEncoder, PromptEncoder
from models.glm_image.random_checkpoint import byte_level_processor
from models.glm_image.renderer import Renderer

M = TypeVar("M", bound=nn.Module)
VAE_FIELDS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


@dataclass
class GlmImage:
    """A model ready to serve.

    `device` and `dtype` are the planner's, the renderer's and the glyph encoder's; the autoencoder shares them.
    """

    prompts: PromptEncoder
    planner: Planner
    glyphs: GlyphEncoder
    renderer: Renderer
    autoencoder: Autoencoder
    scheduler: FlowMatchEulerDiscreteScheduler
    sampling: SamplingDefaults
    defaults: RequestDefaults
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, model: str, device: torch.device, dtype: torch.dtype) -> "GlmImage":
        """Load a checkpoint in the published layout from a folder or a hub id.

        Raises:
            CheckpointError: files or keys are missing or do not fit; the message names them.
        """
        folder = find_checkpoint(model)
        read_json(folder / "model_index.json")
        defaults = RequestDefaults.read(folder / "glimmer.json")
        encoder_json = read_json(folder / "vision_language_encoder" / "config.json")
        planner_config = PlannerConfig.from_json(encoder_json)
        renderer_config = RendererConfig.from_json(read_json(folder / "transformer" / "config.json"))
        if renderer_config.prior_vq_quantizer_codebook_size != planner_config.codebook_size:
            raise CheckpointError(
                f"the planner has {planner_config.codebook_size} codes, "
                f"the renderer {renderer_config.prior_vq_quantizer_codebook_size}"
            )

        def read(part: str, build: Callable[[], M], rename: Callable[[str], str | None] = lambda key: key) -> M:
            module = _on_meta(build)
            load_weights(module, folder / part, dtype=dtype, device=device, rename=rename)
            return module

        t5 = T5Config.from_dict(read_json(folder / "text_encoder" / "config.json"))
        vae_json = read_json(folder / "vae" / "config.json")
        generation = folder / "vision_language_encoder" / "generation_config.json"
        glyph_model = read("text_encoder", lambda: T5EncoderModel(t5))
        return cls(
            prompts=_processor(folder),
            planner=read("vision_language_encoder", lambda: Planner(planner_config), planner_key),
            glyphs=GlyphEncoder(ByT5Tokenizer.from_pretrained(folder / "tokenizer"), glyph_model),
            renderer=read("transformer", lambda: Renderer(renderer_config)),
            autoencoder=Autoencoder(read("vae", lambda: _vae(vae_json))),
            scheduler=_scheduler(read_json(folder / "scheduler" / "scheduler_config.json")),
            sampling=SamplingDefaults.from_json(read_json(generation) if generation.is_file() else {}),
            defaults=defaults,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def random(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int = 0,
        planner: PlannerConfig | None = None,
        renderer: RendererConfig | None = None,
    ) -> "GlmImage":
        """The published sizes, or those given, with random weights made on the device: for benchmarks."""
        planner_config, renderer_config = planner or PlannerConfig(), renderer or RendererConfig()

        def make(build: Callable[[], M]) -> M:
            module = _on_meta(build)
            randomise(module, dtype=dtype, device=device, seed=seed)
            return module

        t5 = T5Config.from_dict(PUBLISHED_GLYPH_ENCODER | {"d_model": renderer_config.text_embed_dim})
        return cls(
            prompts=PromptEncoder(byte_level_processor(planner_config.codebook_size)),
            planner=make(lambda: Planner(planner_config)),
            glyphs=GlyphEncoder(ByT5Tokenizer(), make(lambda: T5EncoderModel(t5))),
            renderer=make(lambda: Renderer(renderer_config)),
            autoencoder=Autoencoder(make(lambda: _vae(PUBLISHED_AUTOENCODER))),
            scheduler=_scheduler(PUBLISHED_SCHEDULER),
            sampling=SamplingDefaults(),
            defaults=RequestDefaults(),
            device=device,
            dtype=dtype,
        )


def planner_key(key: str) -> str | None:
    """A key of `GlmImageForConditionalGeneration` -> ours; None for the vision tokenizer, which only edits need."""
    if key.startswith(("model.visual.", "model.vqmodel.")):
        return None
    return key.removeprefix("model.language_model.")


def _on_meta(build: Callable[[], M]) -> M:
    with torch.device("meta"):
        return build()


def _vae(config: dict) -> AutoencoderKL:
    return AutoencoderKL.from_config(VAE_FIELDS | config)  # type: ignore[return-value]


def _scheduler(config: dict) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config(config)  # type: ignore[return-value]


def _processor(folder: Path) -> PromptEncoder:
    try:
        return PromptEncoder.load(folder / "processor")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'processor'} cannot be loaded: {error}") from error
