"""Latents of many posters, computed once: the renderer trains on these."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.nano.recipe import prompts, world
from models.nano.recipe.autoencoder import latents_of, pixels_of
from models.nano.recipe.loop import autocast
from models.nano.recipe.prompts import Edit
from models.nano.recipe.world import Poster

PER_SHARD = 200
# Letters that are drawn alike, or were at first: some posters are made of these, so that they are told apart.
ALIKE = ("0OQDCGU", "8B6S3E", "2Z7", "1IJTL", "PFREB", "VYUW", "4AMNH", "69G", "5S", "KXY")
ALIKE_SHARE = 0.4


@dataclass
class Shard:
    """Posters of one size with their latents; of edits, also the latents before."""

    posters: list[Poster]
    latents: Tensor  # [n, channels, height / 8, width / 8] bfloat16, not normalised
    edits: list[Edit] | None = None
    before: Tensor | None = None


def _name(width: int, height: int, edits: bool, index: int) -> str:
    return f"latents-{'edit-' if edits else ''}{width}x{height}-{index}"


def make_shard(model: AutoencoderKL, folder: Path, width: int, height: int, edits: bool, index: int) -> None:
    """Compute one shard, unless it is there."""
    name = _name(width, height, edits, index)
    path = folder / f"{name}.pt"
    if path.exists():
        return
    posters, changes = _posters(name, edits)
    made = {"latents": _encode(model, posters, width, height)}
    if changes:
        made["before"] = _encode(model, [c.before for c in changes], width, height)
    partial = path.with_suffix(".partial")
    torch.save(made, partial)
    partial.replace(path)


def load_shards(folder: Path, width: int, height: int, edits: bool, start: int) -> Iterator[Shard]:
    """The shards from number `start` on, as far as they have been made."""
    while (path := folder / f"{_name(width, height, edits, start)}.pt").exists():
        posters, changes = _posters(path.stem, edits)
        data = torch.load(path)
        yield Shard(posters, data["latents"], changes, data.get("before"))
        start += 1


def statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [channels] of the first square shards; they normalise all latents."""
    some = [shard.latents.float() for shard, _ in zip(load_shards(folder, 256, 256, False, 0), range(2), strict=False)]
    found = torch.cat(some)
    return found.mean((0, 2, 3)), found.std((0, 2, 3))


def _posters(name: str, edits: bool) -> tuple[list[Poster], list[Edit] | None]:
    rng = Random(name)
    if edits:
        changes = [_alike_edit(prompts.random_edit(rng), rng) for _ in range(PER_SHARD)]
        return [c.after for c in changes], changes
    return [_alike(prompts.random_poster(rng), rng, {}) for _ in range(PER_SHARD)], None


def _alike_edit(edit: Edit, rng: Random) -> Edit:
    """An edit with other letters; its instruction, which the renderer does not read, stays as it is."""
    spelt: dict[str, str] = {}
    return replace(edit, before=_alike(edit.before, rng, spelt), after=_alike(edit.after, rng, spelt))


def _alike(poster: Poster, rng: Random, spelt: dict[str, str]) -> Poster:
    """The poster, its letters now and then replaced by ones like them; `spelt` keeps how a string has been spelt."""
    for name in ("headline", "footer"):
        line = getattr(poster, name)
        if line:
            poster = replace(poster, **{name: replace(line, text=spelt.setdefault(line.text, _spell(line.text, rng)))})
    return poster


def _spell(text: str, rng: Random) -> str:
    if rng.random() >= ALIKE_SHARE:
        return text
    while True:
        groups = [rng.choice([g for g in ALIKE if letter in g] or [letter]) for letter in text.upper()]
        made = "".join(rng.choice(group) for group in groups)
        if not prompts.held_out(made):
            return made


@torch.no_grad()
def _encode(model: AutoencoderKL, posters: list[Poster], width: int, height: int) -> Tensor:
    made = []
    for poster in posters:
        with autocast():
            pixels = pixels_of([world.draw(poster, width, height)])
            made.append(latents_of(model, pixels).to("cpu", torch.bfloat16))
    return torch.cat(made)
