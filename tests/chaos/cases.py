"""What is asked for, and which bytes must come back."""

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
from server.requests.images import prepare
from tests.chaos.stub import files

MODEL = "glm-image"  # as the API calls it
MAX_PIXELS = 2048 * 2048
SIZES = ((64, 64), (96, 64), (64, 96))
MOST_TWINS = 20
FORMATS = ("png", "png", "jpeg", "webp")

Kind = Literal["plain", "stream", "job", "twins", "edit", "cancelled", "leaves"]
"""plain      waits for the JSON answer
stream     server-sent events with partial images
job        `Prefer: respond-async`, then asks or follows until the end
twins      several equal requests at once, with one idempotency key
edit       a form with a picture
cancelled  a job that is cancelled on its way
leaves     plain or stream, but the connection is closed on the way
"""

MIXED: Mapping[Kind, int] = {"plain": 40, "stream": 20, "job": 20, "twins": 5, "edit": 5, "cancelled": 5, "leaves": 5}


@dataclass(frozen=True)
class Case:
    """One thing to ask for. Its prompt is unlike any other's, so that journals can be searched for it.

    Args:
        moment: 0..1, how far into a usual job's life a client leaves or cancels.
        follows: a stream rather than a plain request, for clients that leave; events rather than polling, for jobs.
        copies: how many twins there are.
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
        """The fields of the request."""
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
        return self.kind == "stream" or (self.kind == "leaves" and self.follows)

    @cached_property
    def upload(self) -> bytes:
        """The picture to edit: like no other's."""
        colour = tuple(hashlib.sha256(self.prompt.encode()).digest()[:3])
        file = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(file, "PNG")
        return file.getvalue()

    def expected(self) -> list[str]:
        """The hashes of the pictures that an undisturbed run gives."""
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


def decoded(item: Mapping[str, Any]) -> str:
    """The hash of a picture in an answer."""
    return digest(base64.b64decode(item["b64_json"]))


@dataclass
class Cases:
    """An endless, seeded supply.

    Args:
        weights: how often each kind comes, relative to the others.
        steps: denoising steps, from and to.
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
                copies=rng.randint(2, MOST_TWINS),
            )
