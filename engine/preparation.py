"""Encode source images and glyphs piece by piece: no step may be long."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import UnreadableJob
from engine.fault_boundary import FaultBoundary
from engine.request import Request
from models.glm_image.model import GlmImage
from models.glm_image.source_images import EncodedImage, PreprocessedImage

GLYPH_TOKENS = 2048  # of a step, or one batch more
SOURCE_SECONDS = 0.5  # of a step, or one layer more


@dataclass(eq=False)
class Preparing:
    """A request and what is left to encode.

    Args:
        sources: yields after every piece whether a source image is complete.
        glyphs: yields the tokens of every computed batch.
        size: of its work, to compare requests.
    """

    request: Request
    sources: Iterator[bool]
    glyphs: Iterator[int]
    size: int
    has_sources_left: bool
    is_complete: bool = False


class Encoder(Protocol):
    """Computes what the steps of a rendering share, piece by piece."""

    def encode_glyphs(self, request: Request) -> Generator[int]: ...

    def read_sources(self, request: Request) -> Generator[bool]: ...


class HalfOfTheTime:
    def __init__(self) -> None:
        self._next_at = 0.0

    @contextmanager
    def turn(self, others_work: bool) -> Iterator[bool]:
        """Yield whether the work is due: if others work, after as much time of theirs."""
        began = time.monotonic()
        is_due = not others_work or began >= self._next_at
        yield is_due
        if is_due:
            self._next_at = 2 * time.monotonic() - began


class Preparation:
    """Encodes for several requests: in every other step the smallest first, else the oldest."""

    def __init__(self, model: GlmImage, runner: Encoder, boundary: FaultBoundary):
        self._model, self._runner, self._boundary = model, runner, boundary
        self._requests: dict[Request, Preparing] = {}  # in order of arrival
        self._steps = 0
        self._tokens_left = 0
        self._source_share, self._glyph_share = HalfOfTheTime(), HalfOfTheTime()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Add a request, for which memory is reserved."""
        size = request.source_patches + len(request.spec.prompt) + len(request.spec.negative_prompt)
        sources, glyphs = self._encode_sources(request), self._runner.encode_glyphs(request)
        self._requests[request] = Preparing(request, sources, glyphs, size, bool(request.spec.num_sources))

    def abort(self, request: Request) -> None:
        """Drop a request."""
        self._requests.pop(request, None)

    def step(self, *, others_work: bool) -> list[Request]:
        """Encode at most one source image and some glyphs; while others work, an equal pause follows. Return complete
        requests.
        """
        self._steps += 1
        in_order = list(self._requests.values())
        if self._steps % 2:
            in_order.sort(key=lambda preparing: preparing.size)
        with_sources = [preparing for preparing in in_order if preparing.has_sources_left]
        with self._source_share.turn(others_work) as is_due:
            self._boundary.run_each(with_sources[: int(is_due)], self._advance_sources)
        without = [preparing for preparing in in_order if not preparing.has_sources_left]
        with self._glyph_share.turn(others_work) as is_due:
            self._tokens_left = GLYPH_TOKENS
            self._boundary.run_each(without if is_due else [], self._advance_glyphs)
        complete = [request for request, preparing in self._requests.items() if preparing.is_complete]
        for request in complete:
            del self._requests[request]
        return complete

    def _advance_sources(self, preparing: Preparing) -> None:
        until = time.monotonic() + SOURCE_SECONDS
        for ends_source in preparing.sources:
            if ends_source or time.monotonic() >= until:
                return
        preparing.has_sources_left = False

    def _advance_glyphs(self, preparing: Preparing) -> None:
        while self._tokens_left > 0:
            tokens = next(preparing.glyphs, None)
            if tokens is None:
                preparing.is_complete = True
                return
            self._tokens_left -= tokens

    def _encode_sources(self, request: Request) -> Iterator[bool]:
        encoded: list[EncodedImage] = []
        for index, image in enumerate(request.preprocessed):
            encoded.append(self._encode_source(request, index, image))
            yield True
        request.encoded, request.preprocessed = encoded, []
        yield from self._runner.read_sources(request)

    def _encode_source(self, request: Request, index: int, image: PreprocessedImage) -> EncodedImage:
        """Encode a source image; its codes may have come with the plan."""
        if not request.source_codes:
            return self._model.encode_source(image)
        grid = request.source_codes[index]
        if (grid.rows, grid.cols) != (image.rows, image.cols):
            raise UnreadableJob("the codes of a source image are not of its size")
        codes = torch.tensor(grid.tokens, device=self._model.device).view(grid.rows, grid.cols)
        return EncodedImage(codes, self._model.autoencoder.encode(image.pixels))
