"""Sizes and defaults; class defaults are the published model's."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.json_files import read_json

# Also in engine/geometry.py, for the API; a test compares them.
CODE_CELL = 32  # pixels a side of a code
PATCH_CELL = 16  # of a renderer token
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 64, 2048, 4
MAX_STEPS = 200
MAX_GUIDANCE_SCALE = 20


@dataclass(frozen=True)
class PlannerConfig:
    """The planner: `text_config` of `vision_language_encoder/config.json`."""

    vocab_size: int = 168064
    vision_vocab_size: int = 16512
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    attention_bias: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    codebook_size: int = 16384

    @property
    def rotary_dim(self) -> int:
        """Return a head's rotated dimensions."""
        return int(self.head_dim * self.partial_rotary_factor)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return the cache's bytes per token."""
        return 2 * itemsize * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "PlannerConfig":
        text, rope = config["text_config"], config["text_config"]["rope_parameters"]
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"rope_type {rope['rope_type']!r} of the planner is not supported; 'default' is")
        if text.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {text['hidden_act']!r} of the planner is not supported; 'silu' is")
        heads = text["num_attention_heads"]
        return cls(
            **_known(cls, text)
            | {
                "num_key_value_heads": text.get("num_key_value_heads") or heads,
                "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
                "rope_theta": rope["rope_theta"],
                "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
                "mrope_section": tuple(rope.get("mrope_section", (8, 12, 12))),
                "codebook_size": config["vq_config"]["num_embeddings"],
            }
        )


@dataclass(frozen=True)
class RendererConfig:
    """The renderer: `transformer/config.json`."""

    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 30
    attention_head_dim: int = 128
    num_attention_heads: int = 32
    text_embed_dim: int = 1472
    time_embed_dim: int = 512
    condition_dim: int = 256
    prior_vq_quantizer_codebook_size: int = 16384

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_dim(self) -> int:
        """Return the values of a latent patch."""
        return self.in_channels * self.patch_size**2

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return the cache's bytes per source token."""
        return 2 * itemsize * self.num_layers * self.dim

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "RendererConfig":
        parsed = cls(**_known(cls, config))
        if parsed.in_channels != parsed.out_channels:
            raise CheckpointError(
                f"the renderer maps {parsed.in_channels} channels to {parsed.out_channels}; equal numbers are expected"
            )
        return parsed


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling of requests that have none: `generation_config.json`."""

    temperature: float = 0.9
    top_p: float = 0.75
    top_k: int | None = None  # transformers' silent default of 50 is not the checkpoint's

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "SamplingDefaults":
        is_sampled = config.get("do_sample", False)
        return cls(
            temperature=float(config.get("temperature") or 1.0) if is_sampled else 0.0,
            top_p=float(config.get("top_p") or 1.0),
            top_k=config.get("top_k") or None,
        )


@dataclass(frozen=True)
class RequestDefaults:
    """Settings of requests that have none: `glimmer.json`."""

    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    size: str | None = None  # "WxH" in pixels; None: `Autoencoder.default_side`
    max_text_characters: int | None = None  # of a quoted text; the rest is not drawn. None: unknown

    @classmethod
    def read(cls, file: Path) -> "RequestDefaults":
        """Read `file`, if it exists.

        Raises:
            CheckpointError: not a JSON object, unknown key, value out of range.
        """
        values = read_json(file) if file.is_file() else {}
        for key, value in values.items():
            if key not in _REQUEST_RANGES:
                raise CheckpointError(f"{file} has an unknown key {key!r}; it may have {', '.join(_REQUEST_RANGES)}")
            fits, accepted = _REQUEST_RANGES[key]
            if not fits(value):
                raise CheckpointError(f"{key} in {file} is {value!r}; expected {accepted}")
        return cls(**values)


def _is_size(value: Any) -> bool:
    match = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", value) if isinstance(value, str) else None
    if match is None:
        return False
    short, long = sorted((int(match[1]), int(match[2])))
    return short >= MIN_SIDE and long <= MAX_SIDE and long <= MAX_ASPECT * short


# `isinstance` would accept booleans as integers.
_REQUEST_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_inference_steps": (
        lambda value: type(value) is int and 1 <= value <= MAX_STEPS,
        f"an integer, 1..{MAX_STEPS}",
    ),
    "guidance_scale": (
        lambda value: type(value) in (int, float) and 0 <= value <= MAX_GUIDANCE_SCALE,
        f"a number, 0..{MAX_GUIDANCE_SCALE}",
    ),
    "max_text_characters": (
        lambda value: type(value) is int and value >= 1,
        "an integer of at least 1",
    ),
    "size": (_is_size, f'"WIDTHxHEIGHT", each side {MIN_SIDE}..{MAX_SIDE}, one at most {MAX_ASPECT} times the other'),
}


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    return {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
