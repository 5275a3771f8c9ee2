"""The planner of transformers, on the same weights: what diffusers' pipeline plans with."""

import time
from typing import Any

from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from benchmarks.measure import synchronize
from models.glm_image.model import GlmImage, build_on_meta

GENERATED = 200  # tokens


def generated_per_second(model: GlmImage, side: int) -> float:
    """Return tokens per second of transformers' `generate` on the same weights, without its prefill."""
    encoder: Any = reference_planner(model)
    processor: Any = model.prompts.processor
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": "a poster"}]}]],
        tokenize=True, target_h=side, target_w=side, return_dict=True, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}

    def seconds(tokens: int) -> float:
        synchronize(model.device)
        started = time.perf_counter()
        encoder.generate(**arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True)
        synchronize(model.device)
        return time.perf_counter() - started

    seconds(8)
    return (GENERATED - 8) / (seconds(GENERATED) - seconds(8))


def reference_planner(model: GlmImage) -> GlmImageForConditionalGeneration:
    """Return transformers' planner with the weights of `model`; it reads no images."""
    c = model.planner.config
    text = {
        name: getattr(c, name)
        for name in ("vocab_size", "vision_vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                     "attention_bias")
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor,
            "mrope_section": list(c.mrope_section)}  # fmt: skip
    tokenizer = model.prompts.processor.tokenizer
    config = GlmImageConfig(
        text_config=text | {"rope_parameters": rope, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id},
        vq_config={"num_embeddings": c.codebook_size},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=c.codebook_size,
        image_end_token_id=c.codebook_size + 1,
    )
    encoder = build_on_meta(lambda: GlmImageForConditionalGeneration(config)).eval()
    encoder.model.visual = encoder.model.vqmodel = nn.Identity()  # type: ignore[assignment]
    state: dict[str, Tensor] = dict(model.planner.state_dict())
    encoder.lm_head.load_state_dict({"weight": state.pop("lm_head.weight")}, assign=True)
    language = encoder.model.language_model
    language.load_state_dict(state, assign=True)
    language.rotary_emb = type(language.rotary_emb)(config.get_text_config()).to(model.device)  # type: ignore[arg-type]
    return encoder
