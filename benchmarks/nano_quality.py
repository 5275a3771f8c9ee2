"""Whether the default checkpoint draws what it is asked: held-out prompts -> pictures -> read back and compared.

    python -m benchmarks.nano_quality                        pictures from a server that it starts
    python -m benchmarks.nano_quality --url http://...       from one that is running
    python -m benchmarks.nano_quality --pipeline             from diffusers' GlmImagePipeline on the same checkpoint
    python -m benchmarks.nano_quality --blank-glyphs         from the server, the letters kept from the renderer
    python -m benchmarks.nano_quality --edits 50             edits of held-out posters, from either

No word and no combination of these prompts was in the training data (models/nano/recipe/prompts.py splits by hash).
Pictures are read by template matching against the drawing code (models/nano/recipe/reading.py), which assumes nothing
of what was asked. A wrong or missing line is a wrong word, so is one that nobody asked for.
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
STEPS, GUIDANCE = 12, 2.5  # the checkpoint's defaults, for the pipeline, which knows none


@dataclass(frozen=True)
class Case:
    """A prompt, the poster it asks for and the picture's size; for an edit also the poster that is edited."""

    prompt: str
    poster: Poster
    width: int
    height: int
    seed: int
    before: Poster | None = None

    @property
    def source(self) -> Image.Image | None:
        """The picture that is edited."""
        return Image.fromarray(draw(self.before, self.width, self.height)) if self.before else None


@dataclass
class Score:
    """Counts of what was right, as (right, asked for)."""

    counts: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, right: float, of: float = 1) -> None:
        count = self.counts.setdefault(name, [0, 0])
        count[0] += right
        count[1] += of


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
    """Add one picture to the score."""
    found = reading.read(image)
    errors = []
    for zone in ("headline", "footer"):
        wanted, got = getattr(case.poster, zone), getattr(found, zone)
        _compare_line(score, wanted, got)
        if _text(wanted) != _text(got):
            errors.append(f"{zone} {_text(wanted)!r} reads {_text(got)!r}")
        if wanted:
            score.add("bars", (got.bar if got else None) == wanted.bar)
    score.add("background", found.background == case.poster.background)
    score.add("shape, colour and zone", found.shapes == case.poster.shapes)
    if found.shapes != case.poster.shapes:
        errors.append(f"{case.poster.shapes} reads {found.shapes}")
    if found.background != case.poster.background:
        errors.append("background")
    score.add("all of it", not errors)
    if errors:
        score.wrong.append(f"{case.width}x{case.height} {case.prompt}\n    " + "; ".join(errors))


def compare_edit(score: Score, case: Case, image: np.ndarray) -> None:
    """Add one edited picture: whether the asked change is there, and whether all else is as before."""
    assert case.before is not None
    found, before, after = (_parts(poster) for poster in (reading.read(image), case.before, case.poster))
    wrong = {name: f"{found[name]}, not {after[name]}" for name in after if found[name] != after[name]}
    changed = {name for name in after if after[name] != before[name]}
    score.add("asked change", not wrong.keys() & changed)
    score.add("rest kept", not wrong.keys() - changed)
    if wrong:
        score.wrong.append(f"{case.prompt}\n    " + "; ".join(f"{name} is {what}" for name, what in wrong.items()))


def _parts(poster: Poster) -> dict[str, Any]:
    """What can change in a poster, one by one."""
    parts: dict[str, Any] = {"background": poster.background}
    for name in ("headline", "footer"):
        line = getattr(poster, name)
        parts[name] = _text(line)
        parts[f"{name} bar"] = line.bar if line else None
    for side in ("left", "center", "right"):
        parts[side] = [shape for shape in poster.shapes if shape.side == side]
    return parts


def _compare_line(score: Score, wanted: Line | None, got: Line | None) -> None:
    want, have = _text(wanted), _text(got)
    if not want and not have:
        return
    score.add("words", want == have)
    if want:
        score.add("characters", max(0, len(want) - distance(want, have)), len(want))


def _text(line: Line | None) -> str:
    return line.text.upper() if line else ""


def distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# --- Where pictures come from ------------------------------------------------------------------------------------


def ask(url: str, case: Case, **extra: Any) -> dict[str, Any]:
    """One picture of the server, at its default steps and guidance."""
    body = {"prompt": case.prompt, "size": f"{case.width}x{case.height}", "seed": case.seed, **extra}
    if (source := case.source) is None:
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
    else:
        file = io.BytesIO()
        source.save(file, "PNG")
        answer = httpx.post(f"{url}/v1/images/edits", data=body, files={"image": file.getvalue()}, timeout=600)
    answer.raise_for_status()
    return answer.json()["data"][0]


def decode(data: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))


def without_strings(prompt: str) -> str:
    """The prompt with nothing in quotes: no letters for the glyph encoder."""
    return re.sub(r"\"[^\"]*\"|'[^']*'|“[^”]*”|「[^」]*」", "", prompt)


def from_server(url: str, cases: Sequence[Case], blank_glyphs: bool) -> Iterator[np.ndarray]:
    """Pictures in the order of the cases; with `blank_glyphs` from the same plans, but without the prompts' strings."""

    def picture(case: Case) -> np.ndarray:
        if not blank_glyphs:
            return decode(ask(url, case))
        plan = ask(url, case, return_plan=True, num_inference_steps=1)["plan"]
        bare = Case(without_strings(case.prompt), case.poster, case.width, case.height, case.seed)
        return decode(ask(url, bare, plan=plan))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        yield from pool.map(picture, cases)


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
        made = pipeline(
            prompt=case.prompt, image=None if source is None else [source], width=case.width, height=case.height,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(case.seed),
        ).images[0]  # fmt: skip
        yield np.asarray(made.convert("RGB"))


# --- Runs --------------------------------------------------------------------------------------------------------


def seconds_alone(url: str, count: int) -> list[float]:
    """Wall-clock seconds of 256x256 pictures, one after the other."""
    taken = []
    for case in held_out_cases(count + 1, seed=1):
        start = time.perf_counter()
        ask(url, Case(case.prompt, case.poster, 256, 256, case.seed))
        taken.append(time.perf_counter() - start)
    return taken[1:]


def save_sheet(images: Sequence[np.ndarray], path: Path, columns: int = 6) -> None:
    """A contact sheet of pictures of one size."""
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images) - columns + 1, columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def print_score(title: str, score: Score, show_wrong: bool) -> None:
    table = Table(title=title)
    for column in ("", "right", "of", "%"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (right, of) in score.counts.items():
        table.add_row(name, f"{right:.0f}", f"{of:.0f}", f"{100 * right / of:.1f}")
    console = Console()
    console.print(table)
    if show_wrong:
        for text in score.wrong:
            console.print(text, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other prompts")
    parser.add_argument("--pipeline", action="store_true", help="diffusers instead of a server")
    parser.add_argument("--blank-glyphs", action="store_true", help="keep the letters from the renderer")
    parser.add_argument("--edits", type=int, metavar="N", help="score N edits instead")
    parser.add_argument("--sheet", type=Path, help="save a contact sheet of the first 24 square pictures")
    parser.add_argument("--wrong", action="store_true", help="list what was wrong")
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
                print(f"seconds per 256x256 picture, alone: median {np.median(alone):.2f}, longest {max(alone):.2f}")
            images = from_server(url, cases, arguments.blank_glyphs)
        for case, image in zip(cases, tqdm(images, total=len(cases), desc="pictures"), strict=True):
            add(score, case, image)
            if (case.width, case.height) == (256, 256):
                square.append(image)
    source = "diffusers" if arguments.pipeline else "server, no glyphs" if arguments.blank_glyphs else "server"
    print_score(f"{len(cases)} held-out {'edits' if arguments.edits else 'prompts'}, {source}", score, arguments.wrong)
    if arguments.sheet:
        save_sheet(square[:24], arguments.sheet)


if __name__ == "__main__":
    main()
