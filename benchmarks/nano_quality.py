"""Measure how often the default checkpoint draws held-out prompts correctly.

    python -m benchmarks.nano_quality                        images from a server that it starts
    python -m benchmarks.nano_quality --url http://...       from a running server
    python -m benchmarks.nano_quality --pipeline             from diffusers' GlmImagePipeline on the same checkpoint
    python -m benchmarks.nano_quality --blank-glyphs         from the server, without letters for the renderer
    python -m benchmarks.nano_quality --edits 50             edits of held-out posters, from either

No word and no combination of these prompts was in the training data (models/nano/recipe/prompts.py splits by hash).
The images are read back by template matching (models/nano/recipe/reading.py) without knowledge of the prompt. The
table has, for each property of a poster, how often it is right. A missing line counts as a wrong word, and so does one
that was not in the prompt.
"""

import argparse
import base64
import io
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from models.nano import CHECKPOINT
from models.nano.recipe import prompts, reading
from models.nano.recipe.world import Line, Poster, draw
from server.cli.demo import running_server

SIZES = ((256, 256),) * 12 + ((384, 256),) * 3 + ((256, 384),) * 3 + ((512, 512),) * 2
CONCURRENCY = 8
STEPS, GUIDANCE = 12, 2.5  # the checkpoint's defaults, which the pipeline does not know


@dataclass(frozen=True)
class Case:
    """A prompt, the poster it describes and the image's size; for an edit also the poster before."""

    prompt: str
    poster: Poster
    width: int
    height: int
    seed: int
    before: Poster | None = None

    @property
    def source(self) -> Image.Image | None:
        """Return the source image of an edit."""
        return Image.fromarray(draw(self.before, self.width, self.height)) if self.before else None


@dataclass
class Score:
    """Counts by property, as [right, total], and descriptions of what was wrong."""

    counts: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, right: float, total: float = 1) -> None:
        count = self.counts.setdefault(name, [0, 0])
        count[0] += right
        count[1] += total


def held_out_cases(count: int, seed: int) -> list[Case]:
    rng = Random(f"held-out/{seed}")
    cases = []
    for i in range(count):
        poster = prompts.random_poster(rng, "held-out")
        cases.append(Case(prompts.describe(poster, rng), poster, *rng.choice(SIZES), seed=i))
    return cases


def held_out_edits(count: int, seed: int) -> list[Case]:
    rng = Random(f"held-out edits/{seed}")
    edits = [prompts.random_edit(rng, "held-out") for _ in range(count)]
    return [Case(edit.instruction, edit.after, 256, 256, i, edit.before) for i, edit in enumerate(edits)]


def compare(score: Score, case: Case, image: np.ndarray) -> None:
    """Add one image to the score."""
    found = reading.read(image)
    errors = []
    for zone in ("headline", "footer"):
        expected, drawn = getattr(case.poster, zone), getattr(found, zone)
        _compare_line(score, expected, drawn)
        if _text(expected) != _text(drawn):
            errors.append(f"{zone} {_text(expected)!r} reads {_text(drawn)!r}")
        if expected:
            score.add("bars", (drawn.bar if drawn else None) == expected.bar)
    score.add("background", found.background == case.poster.background)
    score.add("shape, colour and zone", found.shapes == case.poster.shapes)
    if found.shapes != case.poster.shapes:
        errors.append(f"{case.poster.shapes} reads {found.shapes}")
    if found.background != case.poster.background:
        errors.append("background")
    score.add("whole poster", not errors)
    if errors:
        score.wrong.append(f"{case.width}x{case.height} {case.prompt}\n    " + "; ".join(errors))


def compare_edit(score: Score, case: Case, image: np.ndarray) -> None:
    """Add one edited image: whether the requested change is there, and whether everything else is as before."""
    assert case.before is not None
    found, before, after = (_parts(poster) for poster in (reading.read(image), case.before, case.poster))
    wrong = {name: f"{found[name]}, not {after[name]}" for name in after if found[name] != after[name]}
    changed = {name for name in after if after[name] != before[name]}
    score.add("requested change", not wrong.keys() & changed)
    score.add("rest kept", not wrong.keys() - changed)
    if wrong:
        score.wrong.append(f"{case.prompt}\n    " + "; ".join(f"{name} is {error}" for name, error in wrong.items()))


def _parts(poster: Poster) -> dict[str, Any]:
    """Return everything that an edit can change, by name."""
    parts: dict[str, Any] = {"background": poster.background}
    for name in ("headline", "footer"):
        line = getattr(poster, name)
        parts[name] = _text(line)
        parts[f"{name} bar"] = line.bar if line else None
    for side in ("left", "center", "right"):
        parts[side] = [shape for shape in poster.shapes if shape.side == side]
    return parts


def _compare_line(score: Score, expected: Line | None, drawn: Line | None) -> None:
    expected_text, text = _text(expected), _text(drawn)
    if not expected_text and not text:
        return
    score.add("words", expected_text == text)
    if expected_text:
        right = max(0, len(expected_text) - distance(expected_text, text))
        score.add("characters", right, len(expected_text))


def _text(line: Line | None) -> str:
    return line.text.upper() if line else ""


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# --- Sources of images -----------------------------------------------------------------------------------------------


def request_image(url: str, case: Case, **extra: Any) -> dict[str, Any]:
    """Request one image of the server, with its default steps and guidance."""
    body = {"prompt": case.prompt, "size": f"{case.width}x{case.height}", "seed": case.seed, **extra}
    if (source := case.source) is None:
        response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
    else:
        file = io.BytesIO()
        source.save(file, "PNG")
        response = httpx.post(f"{url}/v1/images/edits", data=body, files={"image": file.getvalue()}, timeout=600)
    response.raise_for_status()
    return response.json()["data"][0]


def decode(data: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))


def without_strings(prompt: str) -> str:
    """Remove the quoted strings, so that the glyph encoder gets no letters."""
    return re.sub(r"\"[^\"]*\"|'[^']*'|“[^”]*”|「[^」]*」", "", prompt)


def from_server(url: str, cases: Sequence[Case], blank_glyphs: bool) -> Iterator[np.ndarray]:
    """Yield the images in the order of the cases; `blank_glyphs` keeps the plans, but removes the prompts' strings."""

    def image_of(case: Case) -> np.ndarray:
        if not blank_glyphs:
            return decode(request_image(url, case))
        plan = request_image(url, case, return_plan=True, num_inference_steps=1)["plan"]
        bare = Case(without_strings(case.prompt), case.poster, case.width, case.height, case.seed)
        return decode(request_image(url, bare, plan=plan))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        yield from pool.map(image_of, cases)


def load_pipeline() -> Any:
    import torch
    from diffusers import GlmImagePipeline

    pipeline = GlmImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_pipeline(pipeline: Any, cases: Iterable[Case]) -> Iterator[np.ndarray]:
    import torch

    for case in cases:
        source = case.source
        image = pipeline(
            prompt=case.prompt, image=None if source is None else [source], width=case.width, height=case.height,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(case.seed),
        ).images[0]  # fmt: skip
        yield np.asarray(image.convert("RGB"))


# --- Runs -------------------------------------------------------------------------------------------------------------


def seconds_alone(url: str, count: int) -> list[float]:
    """Return the seconds of `count` 256x256 images, one after the other, after one that warms up."""
    seconds = []
    for case in held_out_cases(count + 1, seed=1):
        start = time.perf_counter()
        request_image(url, Case(case.prompt, case.poster, 256, 256, case.seed))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def save_sheet(images: Sequence[np.ndarray], path: Path, columns: int = 6) -> None:
    """Save a contact sheet of images of one size."""
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images) - columns + 1, columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def print_score(title: str, score: Score, show_wrong: bool) -> None:
    table = Table(title=title)
    for column in ("", "right", "of", "%"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (right, total) in score.counts.items():
        table.add_row(name, f"{right:.0f}", f"{total:.0f}", f"{100 * right / total:.1f}")
    console = Console()
    console.print(table)
    if show_wrong:
        for text in score.wrong:
            console.print(text, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    parser.add_argument("--pipeline", action="store_true", help="use diffusers instead of a server")
    parser.add_argument("--blank-glyphs", action="store_true", help="give the renderer no letters")
    parser.add_argument("--edits", type=int, metavar="N", help="score N edits instead")
    parser.add_argument("--sheet", type=Path, help="save a contact sheet of the first 24 images of 256x256")
    parser.add_argument("--wrong", action="store_true", help="list the errors")
    arguments = parser.parse_args()
    if arguments.edits:
        cases, add = held_out_edits(arguments.edits, arguments.seed), compare_edit
    else:
        cases, add = held_out_cases(arguments.prompts, arguments.seed), compare
    score, square = Score(), []
    with ExitStack() as stack:
        if arguments.pipeline:
            images = from_pipeline(load_pipeline(), cases)
        else:
            url = arguments.url or stack.enter_context(
                running_server(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glimmer-"))))
            )
            if not arguments.blank_glyphs and not arguments.edits:
                alone = seconds_alone(url, 10)
                print(
                    f"seconds per 256x256 image, one at a time: median {np.median(alone):.2f}, longest {max(alone):.2f}"
                )
            images = from_server(url, cases, arguments.blank_glyphs)
        for case, image in zip(cases, tqdm(images, total=len(cases), desc="images"), strict=True):
            add(score, case, image)
            if (case.width, case.height) == (256, 256):
                square.append(image)
    source = "diffusers" if arguments.pipeline else "server, no glyphs" if arguments.blank_glyphs else "server"
    print_score(f"{len(cases)} held-out {'edits' if arguments.edits else 'prompts'}, {source}", score, arguments.wrong)
    if arguments.sheet:
        save_sheet(square[:24], arguments.sheet)


if __name__ == "__main__":
    main()
