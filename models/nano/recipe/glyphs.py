"""Training of the glyph encoder, which gives the renderer the letters of strings.

Strings are joined in no order, so every embedding has to predict its letter, its place, and the first letter of its
string, to which the plan's codes refer.
"""

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from models.nano.recipe import codes, layouts
from models.nano.recipe.loop import Losses, device, train, trained
from models.nano.recipe.world import ALPHABET, MAX_LETTERS

DIM = 128
TOKENS = 18  # one pad in front, sixteen letters, the end
PAD, END, BYTE_0 = 0, 1, 3


def make_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            # 64 buckets distinguish all distances up to 16; the usual 32 merge 8 to 11.
            relative_attention_num_buckets=64,
            dropout_rate=0.0,
        )
    )


def random_case(text: str, rng: Random) -> str:
    draw = rng.random()
    return text if draw > 0.2 else text.lower() if draw > 0.1 else text.capitalize()


def string_ids(strings: list[str]) -> list[list[int]]:
    """Return byte tokens as in the pipeline, with a pad before each of an even number of strings."""
    strings = strings or [""]
    pad = [PAD] * ((len(strings) + 1) % 2)
    return [[*pad, *(b + BYTE_0 for b in s.encode()), END][:TOKENS] for s in strings]


def batch_ids(all_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens [n, TOKENS] and their mask."""
    ids = torch.tensor([i + [PAD] * (TOKENS - len(i)) for i in all_ids], device=device())
    mask = torch.tensor([[1] * len(i) + [0] * (TOKENS - len(i)) for i in all_ids], device=device())
    return ids, mask


def train_glyphs(folder: Path, steps: int) -> T5EncoderModel:
    encoder = make_encoder()
    probes = nn.ModuleList([nn.Linear(DIM, n) for n in (len(ALPHABET), MAX_LETTERS, codes.INITIALS, MAX_LETTERS)])
    module = nn.ModuleList([encoder, probes]).to(device())

    def loss_of(step: int, rng: Random) -> tuple[Tensor, Losses]:
        strings, ids = [], []
        for _ in range(192):
            text = layouts.random_text(rng, "train")[:MAX_LETTERS]
            strings.append(text)
            ids += string_ids([random_case(text, rng)] + [""] * rng.randrange(2))[:1]
        tokens, mask = batch_ids(ids)
        hidden = encoder(tokens, attention_mask=mask).last_hidden_state
        places = [(i, (ids[i][0] == PAD) + j) for i, s in enumerate(strings) for j in range(len(s))]
        letters = hidden[torch.tensor([i for i, _ in places]), torch.tensor([j for _, j in places])]
        targets = torch.tensor(
            [(ALPHABET.index(c), j, codes.initial_of(s), len(s) - 1) for s in strings for j, c in enumerate(s)],
            device=device(),
        )
        losses = [F.cross_entropy(probe(letters), targets[:, k]) for k, probe in enumerate(probes)]
        names = ("letter", "place", "initial", "length")
        return torch.stack(losses).sum(), {n: v.item() for n, v in zip(names, losses, strict=True)}

    train("glyphs", module, loss_of, folder, steps=steps, learning_rate=3e-3)
    return encoder


def trained_encoder(folder: Path) -> T5EncoderModel:
    """Return the trained encoder without the probes."""
    encoder = make_encoder()
    prefix = "0."
    state = trained(folder, "glyphs")
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return encoder
