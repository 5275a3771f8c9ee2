import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import PIL
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from models.checkpoint import find_checkpoint, fingerprint, load_weights
from models.errors import CheckpointError
from models.glm_image.autoencoder import Autoencoder
from models.glm_image.config import (
    PlannerConfig,
    RendererConfig,
    RequestDefaults,
    SamplingDefaults,
)
from models.glm_image.glyphs import GlyphEncoder
from models.glm_image.planner import Planner
from models.glm_image.prompt import PromptEncoder
from models.glm_image.renderer import Renderer
from models.glm_image.source_images import EncodedImage, ImagePreprocessor, PreprocessedImage
from models.glm_image.vision import VisionTokenizer, vision_key
from models.json_files import read_json

M = TypeVar("M", bound=nn.Module)
Stage = Literal["all", "plan", "render"]
VAE_FIELDS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


@dataclass
class GlmImage:
    """All networks have the same device and dtype; those that a stage does not need are on the meta device."""

    prompts: PromptEncoder
    preprocessor: ImagePreprocessor
    vision: VisionTokenizer
    planner: Planner
    glyphs: GlyphEncoder
    renderer: Renderer
    autoencoder: Autoencoder
    scheduler: FlowMatchEulerDiscreteScheduler
    sampling: SamplingDefaults
    defaults: RequestDefaults
    device: torch.device
    dtype: torch.dtype
    stage: Stage = "all"
    _hooks: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def load(cls, model: str, device: torch.device, dtype: torch.dtype, stage: Stage = "all") -> "GlmImage":
        """Load from a folder or a hub id.

        Args:
            stage: which weights to load: the planner's and the vision tokenizer's, all others, or all.

        Raises:
            CheckpointError: files or keys are missing or wrong.
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
            module = build_on_meta(build)
            if stage in ("all", "plan" if part == "vision_language_encoder" else "render"):
                load_weights(module, folder / part, dtype=dtype, device=device, rename=rename)
            return module

        t5 = T5Config.from_dict(read_json(folder / "text_encoder" / "config.json"))
        vae_json = read_json(folder / "vae" / "config.json")
        generation = folder / "vision_language_encoder" / "generation_config.json"
        glyph_model = read("text_encoder", lambda: T5EncoderModel(t5))
        prompts = _processor(folder)
        return cls(
            prompts=prompts,
            preprocessor=ImagePreprocessor(prompts.processor.image_processor),
            vision=read("vision_language_encoder", lambda: VisionTokenizer.from_json(encoder_json), vision_key),
            planner=read("vision_language_encoder", lambda: Planner(planner_config), planner_key),
            glyphs=GlyphEncoder(ByT5Tokenizer.from_pretrained(folder / "tokenizer"), glyph_model),
            renderer=read("transformer", lambda: Renderer(renderer_config)),
            autoencoder=Autoencoder(read("vae", lambda: build_autoencoder(vae_json))),
            scheduler=build_scheduler(read_json(folder / "scheduler" / "scheduler_config.json")),
            sampling=SamplingDefaults.from_json(read_json(generation) if generation.is_file() else {}),
            defaults=defaults,
            device=device,
            dtype=dtype,
            stage=stage,
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return all networks, loaded or not."""
        return self.vision, self.planner, self.glyphs.encoder, self.renderer, self.autoencoder.vae

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the loaded weights; shared ones count once."""
        loaded = {id(p): p.nbytes for network in self.networks for p in network.parameters() if not p.is_meta}
        return sum(loaded.values())

    def planning_fingerprint(self) -> str:
        """Return a digest of what decides a plan, "" without a planner. Reads the weights."""
        if self.stage == "render":
            return ""
        parts = [
            self.prompts.settings, self.preprocessor.settings, self.vision.settings, fingerprint(self.vision),
            repr(self.planner.config), fingerprint(self.planner), repr(self.sampling), self.device.type,
            torch.__version__, transformers.__version__, PIL.__version__,
        ]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def fingerprints(self) -> tuple[str, str, str]:
        """Return digests of all weights, of the planner's and of the renderer's; "" where they are not loaded."""
        planner, renderer = (self.vision, self.planner), (self.glyphs.encoder, self.renderer, self.autoencoder.vae)
        planners = list(map(fingerprint, planner)) if self.stage != "render" else []
        renderers = list(map(fingerprint, renderer)) if self.stage != "plan" else []
        whole = planners + renderers if self.stage == "all" else []
        return _digest(whole), _digest(planners), _digest(renderers)

    def on_progress(self, beat: Callable[[], object]) -> None:
        """Call only `beat` before every layer on a CPU, where one can take seconds; elsewhere a call only enqueues
        work.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.device.type != "cpu":
            return
        for network in self.networks:
            lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
            layers = [layer for modules in lists for layer in modules if layer is not None]
            self._hooks += [layer.register_forward_pre_hook(lambda *_: beat()) for layer in layers]

    def encode_source(self, image: PreprocessedImage) -> EncodedImage:
        """Encode a source image, without latents if they are of no use to the stage."""
        latents = torch.empty(0) if self.stage == "plan" else self.autoencoder.encode(image.pixels)
        return EncodedImage(self.vision(image), latents)


def planner_key(key: str) -> str | None:
    """Map a key of `GlmImageForConditionalGeneration` to `Planner`'s; None for the vision tokenizer."""
    if key.startswith(("model.visual.", "model.vqmodel.")):
        return None
    return key.removeprefix("model.language_model.")


def _digest(fingerprints: list[str]) -> str:
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16] if fingerprints else ""


def build_on_meta(build: Callable[[], M]) -> M:
    with torch.device("meta"):
        return build()


def build_autoencoder(config: dict) -> AutoencoderKL:
    return AutoencoderKL.from_config(VAE_FIELDS | config)  # type: ignore[return-value]


def build_scheduler(config: dict) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config(config)  # type: ignore[return-value]


def _processor(folder: Path) -> PromptEncoder:
    try:
        return PromptEncoder.load(folder / "processor")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'processor'} cannot be loaded: {error}") from error
