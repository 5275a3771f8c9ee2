from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.nano.recipe import layouts, prompts, world
from models.nano.recipe.autoencoder import latents_of, pixels_of
from models.nano.recipe.loop import autocast
from models.nano.recipe.prompts import Edit
from models.nano.recipe.world import Poster

PER_SHARD = 200
# Letters that look alike: some posters are spelt with these.
SIMILAR_LETTERS = ("0OQDCGU", "8B6S3E", "2Z7", "1IJTL", "PFREB", "VYUW", "4AMNH", "69G", "5S", "KXY")
SIMILAR_SHARE = 0.4


@dataclass
class Shard:
    """Posters of one size."""

    posters: list[Poster]
    latents: Tensor  # [n, channels, height / 8, width / 8] bfloat16, not normalised
    edits: list[Edit] | None = None
    before: Tensor | None = None  # of edits, like latents


def _name(width: int, height: int, edits: bool, index: int) -> str:
    return f"latents-{'edit-' if edits else ''}{width}x{height}-{index}"


def make_shard(model: AutoencoderKL, folder: Path, width: int, height: int, edits: bool, index: int) -> None:
    """Compute one shard unless its file exists."""
    name = _name(width, height, edits, index)
    path = folder / f"{name}.pt"
    if path.exists():
        return
    posters, edited = _posters(name, edits)
    data = {"latents": _encode(model, posters, width, height)}
    if edited:
        data["before"] = _encode(model, [edit.before for edit in edited], width, height)
    partial = path.with_suffix(".partial")
    torch.save(data, partial)
    partial.replace(path)


def load_shards(folder: Path, width: int, height: int, edits: bool, start: int) -> Iterator[Shard]:
    """Yield the existing shards from number `start` on."""
    while (path := folder / f"{_name(width, height, edits, start)}.pt").exists():
        posters, edited = _posters(path.stem, edits)
        data = torch.load(path)
        yield Shard(posters, data["latents"], edited, data.get("before"))
        start += 1


def statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [channels] of the first two square shards."""
    shards = islice(load_shards(folder, 256, 256, False, 0), 2)
    latents = torch.cat([shard.latents.float() for shard in shards])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def _posters(name: str, edits: bool) -> tuple[list[Poster], list[Edit] | None]:
    rng = Random(name)
    if edits:
        edited = [_respell_edit(prompts.random_edit(rng), rng) for _ in range(PER_SHARD)]
        return [edit.after for edit in edited], edited
    return [_respell(layouts.random_poster(rng), rng, {}) for _ in range(PER_SHARD)], None


def _respell_edit(edit: Edit, rng: Random) -> Edit:
    """Respell both posters; the renderer does not get the instruction."""
    spellings: dict[str, str] = {}
    return replace(edit, before=_respell(edit.before, rng, spellings), after=_respell(edit.after, rng, spellings))


def _respell(poster: Poster, rng: Random, spellings: dict[str, str]) -> Poster:
    """Replace the letters of some lines; `spellings` keeps those of earlier strings."""
    for zone in world.ZONES:
        line = getattr(poster, zone)
        if line:
            text = spellings.setdefault(line.text, _spell(line.text, rng))
            poster = replace(poster, **{zone: replace(line, text=text)})
    return poster


def _spell(text: str, rng: Random) -> str:
    if rng.random() >= SIMILAR_SHARE:
        return text
    while True:
        groups = [rng.choice([g for g in SIMILAR_LETTERS if letter in g] or [letter]) for letter in text.upper()]
        spelling = "".join(rng.choice(group) for group in groups)
        if not prompts.held_out(spelling):
            return spelling


@torch.no_grad()
def _encode(model: AutoencoderKL, posters: list[Poster], width: int, height: int) -> Tensor:
    latents = []
    for poster in posters:
        with autocast():
            pixels = pixels_of([world.draw(poster, width, height)])
            latents.append(latents_of(model, pixels).to("cpu", torch.bfloat16))
    return torch.cat(latents)
