import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from torch import Tensor
from transformers import ByT5Tokenizer, GenerationConfig, GlmImageForConditionalGeneration, GlmImageProcessor

from models.nano.recipe import codes
from models.nano.recipe.planner import TrainedPlanner, make_config
from models.nano.recipe.renderer import TrainedRenderer, make_renderer
from models.nano.recipe.tokenizer import IMAGE_END, IMAGE_START, VISION_VOCABULARY, make_processor
from models.nano.recipe.vision import TrainedTokenizer
from models.nano.recipe.world import MAX_LETTERS

# Defaults of requests.
REQUEST_DEFAULTS = {
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "size": "256x256",
    "max_text_characters": MAX_LETTERS,
}
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_p": 0.75, "top_k": 50}


@torch.no_grad()
def assemble(
    out: Path,
    planner: TrainedPlanner,
    vision: TrainedTokenizer,
    renderer: TrainedRenderer,
    autoencoder: AutoencoderKL,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Write the checkpoint in bfloat16; `mean` and `std` [c] normalise latents."""
    processor = make_processor()
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(split_special_tokens=True), processor=processor, text_encoder=renderer.glyphs,
        vision_language_encoder=_planner(planner, vision, processor), vae=autoencoder,
        transformer=_renderer(renderer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
        ),
    )  # fmt: skip
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(out)
    vocabulary = out / "processor" / "tokenizer.json"
    compact = json.dumps(json.loads(vocabulary.read_text()), ensure_ascii=False, separators=(",", ":"))
    vocabulary.write_text(compact)  # a quarter smaller
    (out / "glimmer.json").write_text(json.dumps(REQUEST_DEFAULTS, indent=2) + "\n")


def _planner(
    planner: TrainedPlanner, vision: TrainedTokenizer, processor: GlmImageProcessor
) -> GlmImageForConditionalGeneration:
    model = GlmImageForConditionalGeneration(make_config(processor.tokenizer))
    text = {name: value for name, value in planner.text.state_dict().items() if not name.startswith("embed_tokens")}
    text["embed_tokens.weight"] = planner.embedding()
    model.model.language_model.load_state_dict(text)
    model.lm_head.weight.copy_(planner.head())
    model.model.visual.load_state_dict(vision.visual.state_dict())
    quantizer = vision.quantizer.state_dict() | {"quantize.embedding.weight": vision.codebook()}
    model.model.vqmodel.load_state_dict(quantizer)
    model.generation_config = GenerationConfig(
        **SAMPLING, eos_token_id=IMAGE_END, pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[IMAGE_START, *codes.UNUSED, *range(IMAGE_END + 1, VISION_VOCABULARY)],
    )  # fmt: skip
    return model


def _renderer(trained: TrainedRenderer) -> GlmImageTransformer2DModel:
    model = make_renderer()
    state = {n: v for n, v in trained.renderer.state_dict().items() if not n.startswith("prior_token_embedding")}
    model.load_state_dict(state | {"prior_token_embedding.weight": trained.codes()})
    return model
