"""Requests, and the bytes they must return."""

import base64
import hashlib
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL import Image

from engine.jobs.job import JobSpec, SourceImages
from server.image_files.images import prepare
from tests.chaos.stub import files

MODEL = "glm-image"  # as the API calls it
MAX_PIXELS = 2048 * 2048
SIZES = ((64, 64), (96, 64), (64, 96))
MAX_TWINS = 20
FORMATS = ("png", "png", "jpeg", "webp")

Kind = Literal["plain", "stream", "job", "twins", "edit", "cancelled", "disconnects"]
"""plain        waits for the JSON response
stream       server-sent events with partial images
job          `Prefer: respond-async`, then polls or follows events until the end
twins        several equal requests at once, with one idempotency key
edit         a form with an image
cancelled    a job that is cancelled before its end
disconnects  plain or stream, but the connection is closed before the end
"""

MIXED: Mapping[Kind, int] = {
    "plain": 40,
    "stream": 20,
    "job": 20,
    "twins": 5,
    "edit": 5,
    "cancelled": 5,
    "disconnects": 5,
}


@dataclass(frozen=True)
class Case:
    """One request. Its prompt is unique, so that journals can be searched for it.

    Args:
        moment: when a client disconnects or cancels, as a share 0..1 of a job's typical duration.
        follows: of disconnecting clients, a stream instead of a plain request; of jobs, events instead of polling.
        copies: number of twins.
    """

    number: int
    kind: Kind
    prompt: str
    seed: int
    width: int = 64
    height: int = 64
    n: int = 1
    steps: int = 10
    output_format: str = "png"
    partial_images: int = 0
    priority: str = "interactive"
    moment: float = 0.5
    follows: bool = False
    copies: int = 1

    @property
    def body(self) -> dict[str, Any]:
        """Return the fields of the request."""
        body: dict[str, Any] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "size": f"{self.width}x{self.height}",
            "n": self.n,
            "num_inference_steps": self.steps,
            "output_format": self.output_format,
            "priority": self.priority,
        }
        if self.streams:
            body |= {"stream": True, "partial_images": self.partial_images}
        return body

    @property
    def streams(self) -> bool:
        return self.kind == "stream" or (self.kind == "disconnects" and self.follows)

    @cached_property
    def upload(self) -> bytes:
        """Return the source image of an edit, unique to the case."""
        colour = tuple(hashlib.sha256(self.prompt.encode()).digest()[:3])
        file = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(file, "PNG")
        return file.getvalue()

    def expected(self) -> list[str]:
        """Return the hashes of the images of an undisturbed run."""
        spec = JobSpec(
            prompt=self.prompt,
            width=self.width,
            height=self.height,
            seed=self.seed,
            n=self.n,
            num_inference_steps=self.steps,
            output_format=self.output_format,  # type: ignore[arg-type]
            num_sources=int(self.kind == "edit"),
            model=MODEL,
        )
        return [digest(file) for file in files(spec, self._sources())]

    def _sources(self) -> SourceImages | None:
        if self.kind != "edit":
            return None
        return prepare([self.upload], None, (self.width, self.height), MAX_PIXELS).source_images


def digest(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


def image_digest(item: Mapping[str, Any]) -> str:
    """Return the hash of an image in a response."""
    return digest(base64.b64decode(item["b64_json"]))


@dataclass
class Cases:
    """Endless, seeded cases.

    Args:
        weights: relative frequency of each kind.
        steps: range of denoising steps.
    """

    seed: int
    weights: Mapping[Kind, int] = field(default_factory=lambda: MIXED)
    steps: tuple[int, int] = (6, 16)

    def __iter__(self) -> Iterator[Case]:
        rng, number = random.Random(self.seed), 0
        kinds, weights = list(self.weights), list(self.weights.values())
        while True:
            number += 1
            [kind] = rng.choices(kinds, weights)
            width, height = rng.choice(SIZES)
            yield Case(
                number,
                kind,
                prompt=f"case {self.seed}-{number}",
                seed=rng.randrange(2**40),
                width=width,
                height=height,
                n=rng.choice((1, 1, 1, 2)),
                steps=rng.randint(*self.steps),
                output_format=rng.choice(FORMATS),
                partial_images=rng.randrange(3),
                priority=rng.choice(("interactive", "interactive", "batch")),
                moment=rng.random(),
                follows=rng.random() < 0.5,
                copies=rng.randint(2, MAX_TWINS),
            )
