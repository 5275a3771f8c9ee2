"""The engine: plan first, render second, many images at once.

One thread calls `Engine.step` in a loop; any thread may `submit` and `cancel`:

    _receive   check new requests, drop cancelled ones
    _admit     in order of arrival: reserve all memory a request needs
    _prepare   encode a source image, and glyphs
    _plan      planner stage: prefill prompts, write the next tokens of every plan
    _render    renderer stage: one denoising step of a batch, decode finished images
    _report    progress

Without the weights of a stage, the engine leaves it to others: a request finishes with its plans, or comes with them.

Neither Redis nor HTTP is needed:

    engine = Engine(GlmImage.load("zai-org/GLM-Image", torch.device("cuda"), torch.bfloat16))
    [[pixels]] = engine.generate([JobSpec(prompt="a poster", width=512, height=512, seed=1)])
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.errors import DeadlinePassed, RequestError
from engine.fault_boundary import FaultBoundary
from engine.jobs.job import JobSpec, SourceImages
from engine.limits import EngineLimits
from engine.observability.metrics import EngineMetrics
from engine.planner.stage import PlannerStage
from engine.preparation import Preparation
from engine.renderer.stage import RendererStage
from engine.request import Event, Failed, Finished, Rendered, Request
from engine.stages import NoPlanner, NoRenderer, Stage
from engine.streams import Streams, streams_of
from models.errors import SourceImageError
from models.glm_image.model import GlmImage
from models.glm_image.source_images import PreprocessedImage
from models.threads import threads

PROGRESS_SECONDS = 0.2  # between reports
PLANNING_MARGIN = 1.5  # each stage is slower while both work


class Engine:
    """The stages over one model, as far as it has their weights."""

    def __init__(
        self,
        model: GlmImage,
        limits: EngineLimits | None = None,
        metrics: EngineMetrics | None = None,
        streams: Streams | None = None,
    ):
        self.model = model
        self.limits = limits = limits or EngineLimits.choose(model)
        self.metrics = metrics = metrics or EngineMetrics()
        self._inbox: deque[Request] = deque()  # filled by any thread, like `_cancelled`
        self._cancelled: deque[str] = deque()
        self._waiting: deque[Request] = deque()  # in order of admission
        self._live: dict[Request, None] = {}  # in order of arrival
        self._events: list[Event] = []
        self._reported_at = 0.0
        self._threads = torch.get_num_threads()  # bytes depend on it
        self._streams = streams or streams_of(model.device)
        self.boundary = FaultBoundary(model.device, self._live, self._fail, metrics.out_of_memory)
        self._renderer = renderer = (
            NoRenderer(limits, model.planner.config.codebook_size, self._emit)
            if model.stage == "plan"
            else RendererStage(model, limits, metrics, self.boundary, self._streams, self._emit)
        )
        self._planner: Stage = (
            NoPlanner()
            if model.stage == "render"
            else PlannerStage(
                model,
                limits,
                metrics,
                self.boundary,
                self._emit,
                on_preview=renderer.render_preview,
                on_plan=renderer.render,
            )
        )
        encoder = renderer if isinstance(renderer, NoRenderer) else renderer.runner
        self._preparation = Preparation(model, encoder, self.boundary)
        if model.device.type == "cuda" and model.stage != "plan":
            self.renderer.bound_decoding(torch.cuda.mem_get_info(model.device)[0])
        self._streams.begin()

    @property
    def planner(self) -> PlannerStage:
        """Return the planner of an engine that plans."""
        assert isinstance(self._planner, PlannerStage)
        return self._planner

    @property
    def renderer(self) -> RendererStage:
        """Return the renderer of an engine that renders."""
        assert isinstance(self._renderer, RendererStage)
        return self._renderer

    def submit(self, request: Request) -> None:
        """Add a request at the next step."""
        self._inbox.append(request)

    def cancel(self, request_id: str) -> None:
        """Drop a request at the next step."""
        self._cancelled.append(request_id)

    def on_progress(self, beat: Callable[[], object]) -> None:
        """Call `beat` before all work that may take seconds."""
        self.boundary.beat = beat
        self.model.on_progress(beat)

    @property
    def is_idle(self) -> bool:
        return not self._inbox and not self._live

    def step(self) -> list[Event]:
        """Advance all requests; return their events."""
        with threads(self._threads):
            self._receive()
            self._admit()
            self._prepare()
            self._plan()
            self._render()
            self._report()
        events, self._events = self._events, []
        return events

    def preprocess_images(self, sources: SourceImages) -> list[PreprocessedImage]:
        """Decode and resize source images, on any thread.

        Raises:
            RequestError: one is invalid.
        """
        try:
            return [self.model.preprocessor.read(file) for file in sources.files]
        except SourceImageError as error:
            raise RequestError(str(error), param="image", code="invalid_image_file") from error

    def generate(
        self, specs: Sequence[JobSpec], sources: Sequence[SourceImages | None] | None = None
    ) -> list[list[Tensor]]:
        """Run requests; return every image as [height, width, 3] uint8."""
        pixels = [[torch.empty(0)] * spec.n for spec in specs]
        for index, (spec, images) in enumerate(zip(specs, sources or [None] * len(specs), strict=True)):
            preprocessed = self.preprocess_images(images) if images else []
            self.submit(Request(str(index), spec, source_images=images, preprocessed=preprocessed))
        while not self.is_idle:
            for event in self.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Rendered):
                    pixels[int(event.request.id)][event.image.index] = event.pixels
        return pixels

    def check_integrity(self) -> None:
        """Raise AssertionError if memory leaked."""
        self._planner.check_integrity()
        self._renderer.check_integrity()
        assert not self.is_idle or (self._planner.is_idle and self._renderer.is_idle)
        assert not self.is_idle or not (self._waiting or len(self._preparation))

    def _receive(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            self._live[request] = None
            self.boundary.run_each([request], self._check)
        while self._cancelled:
            request_id = self._cancelled.popleft()
            for request in [r for r in self._live if r.id == request_id]:
                self._forget(request)

    def _admit(self) -> None:
        """Admit in order of arrival: small requests must not starve a large one."""
        for request in [r for r in self._waiting if r.deadline_at <= time.monotonic()]:
            self._fail(request, DeadlinePassed("the deadline came before there was room"))
        while self._waiting and self._fits(self._waiting[0]):
            self.boundary.run_each([self._waiting.popleft()], self._reserve)

    def _prepare(self) -> None:
        others_work = not (self._planner.is_idle and self._renderer.is_idle)
        with self._streams.on("renderer"):
            self.boundary.run_each(self._preparation.step(others_work=others_work), self._begin)

    def _plan(self) -> None:
        """Do one planner step, or as many as a renderer step takes if plans are needed soon.

        Batches stay large: a step costs almost as much for 1 sequence as for 16.
        """
        started = time.monotonic()
        while not self._planner.is_idle:
            with self._streams.on("planner"):
                self._planner.step()
            in_no_hurry = self._renderer.seconds_left > PLANNING_MARGIN * self._planner.seconds_left
            if in_no_hurry or self._renderer.is_idle or self._renderer.is_due(started):
                break

    def _render(self) -> None:
        self._renderer.step(may_wait=self._planner.is_idle)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = now
            for request in self._live:
                stage = self._renderer if request.is_planned else self._planner
                self._emit(stage.progress(request))

    def _check(self, request: Request) -> None:
        request.set_known_plans()
        self._renderer.check(request)
        self._planner.check(request)
        self._waiting.append(request)

    def _fits(self, request: Request) -> bool:
        return self._planner.fits(request) and self._renderer.fits(request)

    def _reserve(self, request: Request) -> None:
        for image in request.images:
            image.admitted_at = time.monotonic()
        self._renderer.reserve(request)
        self._planner.reserve(request)
        self._preparation.add(request)

    def _begin(self, request: Request) -> None:
        for source in request.encoded:
            self._streams.follow("planner", "renderer")
            self._streams.keep(source.codes, "planner")
        self._renderer.admit(request)
        self._planner.admit(request)

    def _emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            del self._live[event.request]
        self._events.append(event)

    def _fail(self, request: Request, error: Exception) -> None:
        self._forget(request)
        self._emit(Failed(request, error))

    def _forget(self, request: Request) -> None:
        del self._live[request]
        if request in self._waiting:
            self._waiting.remove(request)
        self._preparation.abort(request)
        self._planner.abort(request)
        self._renderer.abort(request)
