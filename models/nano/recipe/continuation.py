"""Start of a training from a checkpoint, which has sums of factors: they are divided by least squares.

Codes and words that the checkpoint lacks get their factors' vectors; new factors those of the nearest old ones.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GlmImageForConditionalGeneration, T5EncoderModel

from models.nano.recipe import autoencoder, codes
from models.nano.recipe.factored import FactoredTable
from models.nano.recipe.loop import device
from models.nano.recipe.planner import TrainedPlanner, make_config
from models.nano.recipe.renderer import TrainedRenderer
from models.nano.recipe.tokenizer import HALF_NAMES, in_bytes, string_token
from models.nano.recipe.vision import TrainedTokenizer
from models.nano.recipe.world import MAX_LETTERS

RIDGE = 1.0
NEW_WORD_STD = 0.1
LANGUAGE, VISUAL, QUANTIZER = "model.language_model.", "model.visual.", "model.vqmodel."


def load_planner(model: TrainedPlanner, tokenizer: Any, checkpoint: Path) -> None:
    """Set the planner's weights from a checkpoint whose vocabulary and codes may be older."""
    state = load_file(checkpoint / "vision_language_encoder" / "model.safetensors")
    text = _part(state, LANGUAGE)
    rows, head = text.pop("embed_tokens.weight"), state["lm_head.weight"].float()
    model.text.load_state_dict(text)
    old = _vocabulary(checkpoint)
    source = torch.full((len(model.embedding.factors),), -1)
    for name, index in tokenizer.get_vocab().items():
        source[index] = old.get(name, -1)
    new_codes = _new_codes(checkpoint)
    _set_table(model.embedding, rows, source.index_fill(0, new_codes, -1), NEW_WORD_STD)
    _set_table(model.head, head, torch.arange(len(head)).index_fill(0, new_codes, -1), 0.0)


def load_renderer(checkpoint: Path) -> TrainedRenderer:
    model = TrainedRenderer(T5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32))
    state = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {name: value.float() for name, value in state.items()}
    rows = state.pop("prior_token_embedding.weight")
    model.renderer.load_state_dict(state)
    _set_table(model.codes, rows, torch.arange(len(rows)).index_fill(0, _new_codes(checkpoint), -1), 0.0)
    return model.to(device())


@torch.no_grad()
def load_vision(tokenizer: Any, checkpoint: Path) -> TrainedTokenizer:
    """Return the vision tokenizer, to be assembled as it is: its codebook's vectors are not divided."""
    model = TrainedTokenizer(GlmImageForConditionalGeneration(make_config(tokenizer)))
    state = load_file(checkpoint / "vision_language_encoder" / "model.safetensors")
    model.visual.load_state_dict(_part(state, VISUAL))
    quantizer = _part(state, QUANTIZER)
    for part in model.codebook.parts:
        part.zero_()
    model.codebook.own.copy_(quantizer.pop("quantize.embedding.weight"))
    model.quantizer.load_state_dict(quantizer)
    return model.to(device())


def load_autoencoder(checkpoint: Path) -> tuple[AutoencoderKL, Tensor, Tensor]:
    """Return the autoencoder, and mean and standard deviation [c] of its latents."""
    model: Any = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    mean, std = (torch.tensor(values) for values in (model.config.latents_mean, model.config.latents_std))
    made: Any = autoencoder.make()
    made.load_state_dict(model.state_dict())
    return made, mean, std


def _vocabulary(checkpoint: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(checkpoint / "processor").get_vocab()


def _new_codes(checkpoint: Path) -> Tensor:
    """Return the codes that the checkpoint does not know: those of long lines, if it has no token for their strings."""
    is_known = in_bytes(string_token(MAX_LETTERS, HALF_NAMES[0])) in _vocabulary(checkpoint)
    return torch.tensor([] if is_known else codes.LONG_LINE, dtype=torch.long)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def _set_table(table: FactoredTable, rows: Tensor, source: Tensor, new_std: float) -> None:
    """Divide `rows` into the table's factors and own vectors; row i is `rows[source[i]]`, unless that is -1."""
    known = source >= 0
    sizes = [len(part) for part in table.parts]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    indicators = torch.zeros(int(known.sum()), sum(sizes))
    for column, offset in enumerate(offsets):
        values = table.factors[known, column]
        indicators[torch.arange(len(values)), offset + values] = (values > 0).float()
    targets = rows[source[known]]
    normal = indicators.T @ indicators + RIDGE * torch.eye(sum(sizes))
    solution = torch.linalg.solve(normal, indicators.T @ targets)
    has_new_factors = not known[list(codes.LONG_LINE)].all()
    for part, offset, size, column in zip(table.parts, offsets, sizes, codes.FACTORS, strict=True):
        fitted = solution[offset : offset + size]
        part.copy_(_with_new_values(fitted, column) if has_new_factors else fitted)
    table.own.zero_()
    table.own[known] = targets - table()[known]
    words = ~known & (table.factors == 0).all(1)
    table.own[words] = torch.randn(int(words.sum()), table.own.shape[1]) * new_std


def _with_new_values(part: Tensor, factor: str) -> Tensor:
    """Set the values of a factor that only long lines have."""
    part = part.clone()
    if factor == "kind":
        part[5] = part[3]
    elif factor == "initial":
        for half in range(codes.HALVES):
            members = [1 + i for i, letter in enumerate(codes.LETTERS) if codes.half_of(letter) == half]
            part[1 + codes.INITIALS + half] = part[members].mean(0)
    elif factor == "slot":
        for slot in range(codes.LONG_SLOTS):
            part[1 + codes.SLOTS + slot] = part[1 + slot % codes.LONG_HALF_CELL_SLOT]
    elif factor == "length":
        part[11:] = part[10]
    return part
