"""Measure how often the default checkpoint draws held-out prompts correctly.

    python -m benchmarks.nano_quality                        images from a server that it starts
    python -m benchmarks.nano_quality --sets free hand       only these of the sets "small", "free" and "hand"
    python -m benchmarks.nano_quality --url http://...       from a running server
    python -m benchmarks.nano_quality --pipeline             from diffusers' GlmImagePipeline on the same checkpoint
    python -m benchmarks.nano_quality --blank-glyphs         from the server, without letters for the renderer
    python -m benchmarks.nano_quality --edits 50             edits of held-out posters, from either
    python -m benchmarks.nano_quality --seeds 4              prompts that leave something open, with 4 seeds each

small   prompts of the small grammar (models/nano/recipe/prompts.py), words and combinations split off by hash
free    prompts of a second grammar (models/nano/heldout/grammar.py), which training never sees
hand    sentences written by hand (models/nano/heldout/by_hand.py)

The images are read back by template matching (models/nano/recipe/reading.py) without knowledge of the prompt, and the
words by tesseract, too, if it is installed. The table has, for each property of a poster, how often it is right; what
a prompt leaves open is right in any way. A missing line counts as a wrong word, and so does one that was not in the
prompt.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import second_reader
from benchmarks.nano_scores import (
    SETS,
    Case,
    Score,
    compare,
    compare_edit,
    compare_seeds,
    free_cases,
    held_out_cases,
    held_out_edits,
)
from models.nano import CHECKPOINT
from server.cli.demo import running_server

CONCURRENCY = 8
STEPS, GUIDANCE = 12, 2.5  # the checkpoint's defaults, which the pipeline does not know


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
        bare = replace(case, prompt=without_strings(case.prompt))
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
        request_image(url, replace(case, width=256, height=256))
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


class Runner:
    """Draws and scores the cases that the arguments name."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack):
        self.arguments, self.square = arguments, list[np.ndarray]()
        self.pipeline = load_pipeline() if arguments.pipeline else None
        self.url = ""
        if not arguments.pipeline:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glimmer-")))
            self.url = arguments.url or stack.enter_context(running_server(folder))
        self.reader = second_reader.read_words if second_reader.is_installed() else None

    @property
    def source(self) -> str:
        return "diffusers" if self.pipeline else "server, no glyphs" if self.arguments.blank_glyphs else "server"

    def images(self, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        if self.pipeline:
            images = from_pipeline(self.pipeline, cases)
        else:
            images = from_server(self.url, cases, self.arguments.blank_glyphs)
        return iter(tqdm(images, total=len(cases), desc="images"))

    def score_sets(self) -> None:
        if not self.reader:
            print("tesseract is not installed (Debian: tesseract-ocr): words are read once, by template matching")
        for name in self.arguments.sets:
            cases_of, usual = SETS[name]
            count = self.arguments.prompts or usual
            self.score(f"{name} prompts", cases_of(count, self.arguments.seed), partial(compare, reader=self.reader))

    def score(self, title: str, cases: Sequence[Case], add: Any) -> None:
        score = Score()
        for case, image in zip(cases, self.images(cases), strict=True):
            add(score, case, image)
            if (case.width, case.height) == (256, 256):
                self.square.append(image)
        print_score(f"{len(cases)} {title}, {self.source}", score, self.arguments.wrong)

    def score_seeds(self) -> None:
        """Score the first prompts of the second grammar that leave something open."""
        seeds, score = self.arguments.seeds, Score()
        cases = [case for case in free_cases(300, 0) if case.open][: self.arguments.prompts or 25]
        images = self.images([replace(case, seed=seed) for case in cases for seed in range(seeds)])
        for case in cases:
            drawn = [next(images) for _ in range(seeds)]
            compare_seeds(score, case, drawn)
            self.square += drawn
        print_score(f"{len(cases)} prompts with {seeds} seeds each, {self.source}", score, self.arguments.wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of prompts; default: all")
    parser.add_argument("--prompts", type=int, help="number of prompts; default: all of a set")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts, or of the images of a fixed set")
    parser.add_argument("--pipeline", action="store_true", help="use diffusers instead of a server")
    parser.add_argument("--blank-glyphs", action="store_true", help="give the renderer no letters")
    parser.add_argument("--edits", type=int, metavar="N", help="score N edits instead")
    parser.add_argument("--seeds", type=int, metavar="N", help="score N seeds of each prompt instead")
    parser.add_argument("--sheet", type=Path, help="save a contact sheet of the first 24 images of 256x256")
    parser.add_argument("--wrong", action="store_true", help="list the errors")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        runner = Runner(arguments, stack)
        if arguments.edits:
            runner.score("held-out edits", held_out_edits(arguments.edits, arguments.seed), compare_edit)
        elif arguments.seeds:
            runner.score_seeds()
        else:
            if runner.url and not arguments.blank_glyphs:
                alone = seconds_alone(runner.url, 10)
                print(
                    f"seconds per 256x256 image, one at a time: median {np.median(alone):.2f}, longest {max(alone):.2f}"
                )
            runner.score_sets()
        if arguments.sheet:
            save_sheet(runner.square[:24], arguments.sheet)


if __name__ == "__main__":
    main()
