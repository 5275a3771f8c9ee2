"""What stands in for a stage that other engines run."""

import time
from collections.abc import Callable, Generator
from typing import Protocol

from engine.admitted import AdmittedRequests
from engine.errors import UnreadableJob
from engine.jobs.job import TokenGrid
from engine.limits import EngineLimits
from engine.renderer.stage import check_request
from engine.request import Event, Finished, Image, Previewed, Progress, Request


class Stage(Protocol):
    """The face of planner and renderer."""

    @property
    def is_idle(self) -> bool: ...

    @property
    def seconds_left(self) -> float: ...

    def check(self, request: Request) -> None: ...

    def fits(self, request: Request) -> bool: ...

    def reserve(self, request: Request) -> None: ...

    def admit(self, request: Request) -> None: ...

    def step(self) -> None: ...

    def abort(self, request: Request) -> None: ...

    def progress(self, request: Request) -> Progress: ...

    def check_integrity(self) -> None: ...


class NoPlanner:
    """Takes requests that come with their plans."""

    is_idle = True
    seconds_left = 0.0

    def check(self, request: Request) -> None:
        """Raise UnreadableJob without a plan, or without the codes of source images."""
        if not request.is_planned or len(request.source_codes) != request.spec.num_sources:
            raise UnreadableJob("a job to render came without its plan or the codes of its source images")

    def fits(self, request: Request) -> bool:
        return True

    def reserve(self, request: Request) -> None:
        """Do nothing, as `admit`, `step` and `abort`."""

    admit = abort = reserve

    def step(self) -> None:
        """Do nothing."""

    def progress(self, request: Request) -> Progress:
        """Report no tokens to write."""
        return Progress(request, "planning", 0, 0)

    def check_integrity(self) -> None:
        """Hold nothing."""


class NoRenderer:
    """Finishes requests when their plans are written, for other engines to render.

    Args:
        emit: gets `Previewed` and, at the end, `Finished`.
    """

    is_idle = True
    seconds_left = 0.0

    def __init__(self, limits: EngineLimits, codebook_size: int, emit: Callable[[Event], None]):
        self._codebook_size, self._emit = codebook_size, emit
        self._admitted = AdmittedRequests(limits.source_patches)

    def check(self, request: Request) -> None:
        """Raise RequestError if no renderer takes the request."""
        check_request(request, self._admitted.max_source_patches, self._codebook_size)

    def fits(self, request: Request) -> bool:
        """Return whether its source images fit in memory."""
        return self._admitted.fits(request)

    def reserve(self, request: Request) -> None:
        """Count its images."""
        self._admitted.add(request)

    def encode_glyphs(self, request: Request) -> Generator[int]:
        """Compute nothing, as `read_sources`."""
        yield from ()

    def read_sources(self, request: Request) -> Generator[bool]:
        yield from ()

    def admit(self, request: Request) -> None:
        """Keep the codes of its source images for the renderer; count images whose plan is known."""
        for source in request.encoded if not request.source_codes else ():
            rows, cols = source.codes.shape
            request.source_codes.append(TokenGrid(rows, cols, source.codes.flatten().tolist()))
        for image in [image for image in request.images if image.plan]:
            self.render(image)

    def render(self, image: Image) -> None:
        """Count a planned image."""
        image.planned_at = time.monotonic()
        if self._admitted.finish_image(image.request):
            self._emit(Finished(image.request))

    def render_preview(self, image: Image) -> None:
        """Offer an image's preview to other engines."""
        assert image.preview is not None
        self._emit(Previewed(image.request, image.index, image.preview))

    def step(self, may_wait: bool = True) -> None:
        """Do nothing."""

    def is_due(self, since: float) -> bool:
        """Ask the planner for one step at a time."""
        return True

    def abort(self, request: Request) -> None:
        """Forget the request."""
        self._admitted.discard(request)

    def progress(self, request: Request) -> Progress:
        """Report that all tokens are written."""
        tokens = request.spec.n * request.spec.image_plan_tokens
        return Progress(request, "planning", tokens, tokens)

    def check_integrity(self) -> None:
        """Nothing is held but by `Engine`."""
