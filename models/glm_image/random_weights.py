"""Random weights for tests and benchmarks; the small checkpoint's layers have the published proportion, 40 to 30."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from models.glm_image.autoencoder import Autoencoder
from models.glm_image.config import PlannerConfig, RendererConfig, RequestDefaults, SamplingDefaults
from models.glm_image.glyphs import GlyphEncoder
from models.glm_image.model import GlmImage, M, build_autoencoder, build_on_meta, build_scheduler
from models.glm_image.planner import Planner
from models.glm_image.prompt import PromptEncoder
from models.glm_image.renderer import Renderer
from models.glm_image.source_images import ImagePreprocessor
from models.glm_image.vision import VisionTokenizer

Sizes = Mapping[str, Any]

# ByT5-small's encoder and CogView4's autoencoder.
PUBLISHED_GLYPH_ENCODER: dict[str, Any] = {
    "vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [128, 512, 1024, 1024], "layers_per_block": 3, "latent_channels": 16, "norm_num_groups": 32,
    "sample_size": 1024, "mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False,
    "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "scaling_factor": 1.0,
}  # fmt: skip
PUBLISHED_SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256,
    "time_shift_type": "linear",
}  # fmt: skip

# The small checkpoint.
CODES = 512
CONTROL_OUTPUTS = 16  # start, end and unused
SIDE = 256  # pixels
PLANNER: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
    },
}  # fmt: skip
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 256, "patch_size": 16, "intermediate_size": 64}
VQ = {"embed_dim": 16, "num_embeddings": CODES, "latent_channels": 32}
GLYPHS = {
    "vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
RENDERER: dict[str, Any] = {
    "patch_size": 2, "in_channels": 8, "out_channels": 8, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 4, "time_embed_dim": 64, "condition_dim": 16,
}  # fmt: skip
VAE = {
    "block_out_channels": [16, 16, 32, 32], "latent_channels": 8, "norm_num_groups": 8, "sample_size": SIDE,
    "latents_mean": [0.1, -0.1] * 4, "latents_std": [0.9, 1.2] * 4, "mid_block_add_attention": False,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip

IMAGE_START, IMAGE_END = "<|dit_token_start|>", "<|dit_token_end|>"
CONTROL_TOKENS = [IMAGE_START, IMAGE_END, "<|endoftext|>", "<sop>", "<eop>", "<|user|>", "<|image|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}<|user|>
{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<|dit_token_start|><|image|><|dit_token_end|>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endfor %}"""


def byte_level_processor(codes: int) -> GlmImageProcessor:
    """Return a processor of bytes, codes and control tokens."""
    vocabulary = [f"<|dit_token_{i}|>" for i in range(codes)] + [IMAGE_START, IMAGE_END]
    vocabulary += [f"<|dit_unused_{i}|>" for i in range(2, CONTROL_OUTPUTS)]
    vocabulary += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IMAGE_START,
        eos_token=IMAGE_END,
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048}
    images = GlmImageImageProcessorPil(patch_size=16, merge_size=1, temporal_patch_size=1, size=pixels)
    return GlmImageProcessor(image_processor=images, tokenizer=fast, chat_template=CHAT_TEMPLATE)


def cached_random_checkpoint(cache: Path) -> Path:
    """Return the small checkpoint's folder, written on first use, in any process."""
    folder = cache / "random-glm-image-4"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        write_random_checkpoint(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished)
    return folder


def write_random_checkpoint(
    folder: Path, seed: int = 0, *, planner: Sizes | None = None, renderer: Sizes | None = None
) -> None:
    """Write the small checkpoint, overriding `PLANNER` and `RENDERER`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _pipeline(PLANNER | dict(planner or {}), RENDERER | dict(renderer or {})).save_pretrained(folder)


def _pipeline(planner_sizes: dict[str, Any], renderer_sizes: dict[str, Any]) -> GlmImagePipeline:
    processor = byte_level_processor(CODES)
    tokenizer = processor.tokenizer
    text = planner_sizes | {
        "vocab_size": len(tokenizer), "vision_vocab_size": CODES + CONTROL_OUTPUTS, "eos_token_id": CODES + 1,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = GlmImageConfig(
        text_config=text,
        vision_config=dict(VISION),
        vq_config=dict(VQ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=CODES,
        image_end_token_id=CODES + 1,
    )
    planner = GlmImageForConditionalGeneration(config)
    planner.lm_head.weight.data.mul_(8)  # so that sampling is not uniform
    planner.generation_config = GenerationConfig(
        do_sample=True, temperature=0.9, top_p=0.75, eos_token_id=CODES + 1, pad_token_id=tokenizer.pad_token_id
    )
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **VAE)  # type: ignore[arg-type]
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=T5EncoderModel(T5Config(**GLYPHS)),
        vision_language_encoder=planner,
        vae=vae,
        transformer=GlmImageTransformer2DModel(
            text_embed_dim=GLYPHS["d_model"], prior_vq_quantizer_codebook_size=CODES, **renderer_sizes
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**PUBLISHED_SCHEDULER),
    )


def random_glm_image(
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    planner: PlannerConfig | None = None,
    renderer: RendererConfig | None = None,
    vision: Sizes | None = None,
) -> GlmImage:
    """Build a model, by default of the published size; `vision`: `vision_config`, `vq_config`."""
    planner_config, renderer_config = planner or PlannerConfig(), renderer or RendererConfig()

    def make(build: Callable[[], M]) -> M:
        module = build_on_meta(build)
        randomise(module, dtype=dtype, device=device, seed=seed)
        return module

    t5 = T5Config.from_dict(PUBLISHED_GLYPH_ENCODER | {"d_model": renderer_config.text_embed_dim})
    processor = byte_level_processor(planner_config.codebook_size)
    return GlmImage(
        prompts=PromptEncoder(processor),
        preprocessor=ImagePreprocessor(processor.image_processor),
        vision=make(lambda: VisionTokenizer.from_json(vision or {})),
        planner=make(lambda: Planner(planner_config)),
        glyphs=GlyphEncoder(ByT5Tokenizer(), make(lambda: T5EncoderModel(t5))),
        renderer=make(lambda: Renderer(renderer_config)),
        autoencoder=Autoencoder(make(lambda: build_autoencoder(PUBLISHED_AUTOENCODER))),
        scheduler=build_scheduler(PUBLISHED_SCHEDULER),
        sampling=SamplingDefaults(),
        defaults=RequestDefaults(),
        device=device,
        dtype=dtype,
    )


def randomise(module: nn.Module, *, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Fill `module`: matrices keep magnitudes, norms are near 1, biases near 0."""
    module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            spread = 0.5 if "embed" in name else parameter[0].numel() ** -0.5
            parameter.data.normal_(0, spread, generator=generator)
        else:
            centre = 1.0 if name.endswith("weight") else 0.0
            parameter.data.normal_(centre, 0.02, generator=generator)
    module.requires_grad_(False).eval()
