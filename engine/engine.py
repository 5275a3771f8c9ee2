"""The engine: plan first, render second, many images at once.

`Engine.step` is all of it, called over and over by one thread; any thread may `submit` and `cancel`. A step takes every
request as far as it goes for now:

    _receive   inbox      tokenize the prompt, refuse what can never be served
    _admit     waiting    in order of arrival: reserve all the memory it will take, look at the pictures to edit
    _plan      planner    prefill the prompt, then write every plan a token further; its length is known beforehand
    _render    renderer   a denoising step of as many images as make a tick; decode those that are done

What happens is told in events: `Planned`, `Partial`, `Rendered` and `Progress`, at last `Finished` or `Failed`. Nobody
fails with a neighbour: a batch that raises is tried again, each request alone (`_guarded`). And nobody's picture is
changed by a neighbour, not in its last bit (`models.batch_invariant`). The engine needs neither Redis nor HTTP:

    engine = Engine(GlmImage.load("zai-org/GLM-Image", torch.device("cuda"), torch.bfloat16))
    [[pixels]] = engine.generate([JobSpec(prompt="a poster", width=512, height=512, seed=1)])
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from engine.checks import check_pictures, check_plan
from engine.device_errors import is_lost_device, is_out_of_memory
from engine.errors import DeadlinePassed, RequestError
from engine.jobs.job import JobSpec, Plan, SourceImages, TokenGrid
from engine.limits import EngineLimits
from engine.moving_average import MovingAverage
from engine.observability.metrics import EngineMetrics
from engine.planner import scheduler as planning
from engine.planner.runner import PlannerRunner
from engine.planner.scheduler import PlannerScheduler
from engine.renderer.runner import RendererRunner, Rendering
from engine.renderer.scheduler import RenderScheduler
from engine.request import Event, Failed, Finished, Image, Partial, Planned, Progress, Rendered, Request
from models.errors import PromptError, SourceImageError
from models.glm_image.model import GlmImage
from models.glm_image.paged_attention import PagedKV
from models.glm_image.prompt import fill_in_codes, place_sources
from models.glm_image.source_images import PreprocessedImage

PROGRESS_SECONDS = 0.2  # between two reports
PLANNING_MARGIN = 1.5  # while both stages work, each is slower than alone


class Item(Protocol):
    @property
    def request(self) -> Request: ...


T = TypeVar("T", bound=Item)


class Engine:
    """Continuous batching of plans over a paged cache, step-level batching of renderings."""

    def __init__(self, model: GlmImage, limits: EngineLimits | None = None, metrics: EngineMetrics | None = None):
        self.model = model
        self.limits = limits = limits or EngineLimits.choose(model)
        self.metrics = metrics or EngineMetrics()
        self.planner = PlannerScheduler(
            limits.blocks, limits.block_size, limits.max_sequences, limits.max_prompt_tokens
        )
        self.planner_runner = PlannerRunner(
            model.planner,
            PagedKV(model.planner.config, limits.blocks, limits.block_size, model.dtype, model.device),
            model.sampling,
            max_sequences=limits.max_sequences,
            max_plan_tokens=limits.max_plan_tokens,
            max_positions=limits.max_positions,
        )
        self.renderer: RenderScheduler[Rendering] = RenderScheduler(limits.render_token_budget)
        self.renderer_runner = RendererRunner(model)
        self._inbox: deque[Request] = deque()  # submitted by any thread
        self._cancelled: deque[str] = deque()  # cancelled by any thread
        self._waiting: deque[Request] = deque()  # prepared; admitted in this order, as soon as they fit
        self._images_left: dict[Request, int] = {}  # of every request that has not ended
        self._events: list[Event] = []
        self._tick_seconds = 0.0  # of the last renderer tick
        self._planner_step_seconds = MovingAverage(0.0)
        self._reported_at = 0.0
        self.metrics.kv_blocks.set(limits.blocks)
        self.metrics.render_token_budget.set(self.renderer.budget.current)

    def submit(self, request: Request) -> None:
        """Take a request in at the next step. It ends with one `Finished` or `Failed`, unless it is cancelled."""
        self._inbox.append(request)

    def cancel(self, request_id: str) -> None:
        """Drop a request at the next step, wherever it is; an unknown id is ignored."""
        self._cancelled.append(request_id)

    @property
    def is_idle(self) -> bool:
        return not self._inbox and not self._images_left

    def step(self) -> list[Event]:
        """One turn of the engine; returns what happened in it."""
        self._receive()
        self._admit()
        self._plan()
        self._render()
        self._report()
        events, self._events = self._events, []
        return events

    def preprocess_images(self, sources: SourceImages) -> list[PreprocessedImage]:
        """The pictures of an edit as `Request.files` has them. Any thread may do this.

        Raises:
            RequestError: one of them cannot be edited.
        """
        try:
            return [self.model.preprocessor.read(file) for file in sources.files]
        except SourceImageError as error:
            raise RequestError(str(error), param="image", code="invalid_image_file") from error

    def generate(
        self, specs: Sequence[JobSpec], sources: Sequence[SourceImages | None] | None = None
    ) -> list[list[Tensor]]:
        """Run requests to the end. Returns pixels [height, width, 3], uint8, for every image of every spec.

        Args:
            sources: for every spec what it edits, if it is an edit.

        Raises:
            RequestError: one of them cannot be served.
        """
        pixels = [[torch.empty(0)] * spec.n for spec in specs]
        for number, (spec, edited) in enumerate(zip(specs, sources or [None] * len(specs), strict=True)):
            pictures = self.preprocess_images(edited) if edited else []
            self.submit(Request(str(number), spec, source_images=edited, preprocessed=pictures))
        while not self.is_idle:
            for event in self.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Rendered):
                    pixels[int(event.request.id)][event.image.index] = event.pixels
        return pixels

    def check_integrity(self) -> None:
        """Raise AssertionError if memory leaked, or if an idle engine still holds anything."""
        self.planner.check_integrity()
        assert not self.is_idle or (self.planner.is_idle and not len(self.renderer) and not self._waiting)
        assert not self.is_idle or not len(self.renderer_runner.source_kv)

    # --- the parts of a step ------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            self._images_left[request] = request.spec.n
            self._guarded_each([request], self._prepare)
        while self._cancelled:
            request_id = self._cancelled.popleft()
            for request in [r for r in self._images_left if r.id == request_id]:
                self._forget(request)

    def _admit(self) -> None:
        """In order of arrival: a large request is never passed over for ever by small ones.

        One edit a step: looking at its pictures takes a while, and those under way should not wait for several. What
        is past its deadline does not begin any more, nor does it keep others waiting.
        """
        for request in [r for r in self._waiting if r.deadline_at <= time.monotonic()]:
            self._fail(request, DeadlinePassed("the deadline came before there was room"))
        while self._waiting and self._fits(self._waiting[0]):
            request = self._waiting.popleft()
            self._guarded_each([request], self._begin)
            if request.spec.num_sources:
                break

    def _plan(self) -> None:
        """One planner step, and as many as a renderer tick takes once the plans are needed soon.

        A planner that runs ahead of the renderer only makes its own batches small: a step costs almost the same for
        one sequence as for sixteen. So there is no hurry as long as what is being rendered lasts well longer than
        writing the plans will take.
        """
        until = time.monotonic() + self._tick_seconds
        while not self.planner.is_idle:
            self._planner_step()
            planning_left = self.planner.steps_left * (self._planner_step_seconds.value or 0.0)
            in_no_hurry = self.renderer.seconds_left > PLANNING_MARGIN * planning_left
            if in_no_hurry or not len(self.renderer) or time.monotonic() >= until:
                break

    def _planner_step(self) -> None:
        started = time.monotonic()
        step = self.planner.schedule()
        prompts = sum(len(group.request.prompt_ids) for group in step.prefill)
        prefill_budget, decode_budget = self.planner.prefill_budget, self.planner.decode_budget
        for group in self._guarded(step.prefill, self.planner_runner.prefill, lambda: prefill_budget.ran_out(prompts)):
            self.planner.mark_prefilled(group)
            self.metrics.prompt_tokens.inc(len(group.request.prompt_ids))
        rows = len(step.decode)
        for sequence in self._guarded(step.decode, self.planner_runner.decode, lambda: decode_budget.ran_out(rows)):
            sequence.written += 1
        self._guarded_each(self.planner.sequences_with_new_preview(), self._start_preview)
        self._guarded_each(self.planner.completed_sequences(), self._finish_plan)
        self.metrics.planner_batch.observe(len(step.decode))
        self.metrics.planner_tokens.inc(len(step.decode) + sum(len(group.sequences) for group in step.prefill))
        seconds = time.monotonic() - started
        self._planner_step_seconds.add(seconds)
        self.metrics.planner_step.observe(seconds)

    def _render(self) -> None:
        picked = self.renderer.pick()
        if not picked:
            return
        started = time.monotonic()
        tokens, rows = sum(r.tokens for r in picked), sum(len(r.rows) for r in picked)
        advanced = self._guarded(picked, self.renderer_runner.advance, lambda: self.renderer.budget.ran_out(tokens))
        self._synchronise()
        self._tick_seconds = time.monotonic() - started
        self.renderer.observe(tokens, self._tick_seconds)
        self.metrics.renderer_step.observe(self._tick_seconds)
        self.metrics.render_token_budget.set(self.renderer.budget.current)
        self.metrics.renderer_rows.observe(rows)
        self.metrics.renderer_tokens.inc(tokens)
        self.metrics.renderer_padding.inc(self.renderer_runner.padding(tokens))
        self._guarded_each([r for r in advanced if r.has_partial_due and not self._waits_for_preview(r)], self._show)
        self._guarded_each([r for r in advanced if not r.steps_left], self._finish_rendering)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = now
            self.metrics.kv_blocks_used.set(self.planner.allocator.used)
            self._events += [self._progress(request) for request in self._images_left]

    # --- what they are made of ----------------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> None:
        """Tokenize, take over the plans that are known, refuse what could never be served."""
        spec, geometry = request.spec, request.spec.geometry
        check_pictures(request, self.limits)
        ids = self.model.prompts.encode(spec.prompt, geometry.canvas_height, geometry.canvas_width, spec.num_sources)
        grids = [(picture.rows, picture.cols) for picture in request.preprocessed]
        request.prompt_ids, request.prompt_positions = place_sources(ids, self.model.prompts.image_token, grids)
        for image in request.images:
            image.plan = Plan.from_dict(spec.plan) if spec.plan else request.plans.get(image.index)
            check_plan(image, self.model.planner.config.codebook_size)
        self.planner.check(request)
        self._waiting.append(request)

    def _fits(self, request: Request) -> bool:
        """Whether memory for all of the request can be reserved now."""
        admitted = sum(r.source_patches for r in self._images_left if r not in self._waiting)
        return self.planner.fits(request) and admitted + request.source_patches <= self.limits.source_patches

    def _begin(self, request: Request) -> None:
        """Everything has room: see the sources, render what is planned, plan the rest."""
        for image in request.images:
            image.admitted_at = time.monotonic()
        request.encoded = [self.model.encode_source(picture) for picture in request.preprocessed]
        codes = torch.cat([source.codes.flatten() for source in request.encoded]).tolist() if request.encoded else []
        request.prompt_ids = fill_in_codes(request.prompt_ids, self.model.prompts.image_token, codes)
        request.preprocessed = []
        self._start_rendering([image for image in request.images if image.plan])
        if not request.is_planned:
            self.planner.add(request)

    def _finish_plan(self, sequence: planning.Sequence) -> None:
        image, grids = sequence.image, sequence.request.spec.grids
        tokens = self.planner_runner.read(sequence)
        self.planner.finish(sequence)
        ends = list(accumulate(grid.tokens for grid in grids))
        *before, plan = [
            TokenGrid(grid.rows, grid.cols, tokens[end - grid.tokens : end])
            for grid, end in zip(grids, ends, strict=True)
        ]
        image.plan = Plan(plan.rows, plan.cols, plan.tokens, before[0] if before else None)
        self.metrics.planning.observe(time.monotonic() - image.admitted_at)
        self._events.append(Planned(image.request, image.index, image.plan))
        self._guarded([image], self._start_rendering)

    def _start_rendering(self, images: list[Image]) -> None:
        """All or none: the renderings are made before any of them is added."""
        prepared = [rendering for image in images for rendering in self._renderings(image)]
        for rendering in prepared:
            rendering.image.planned_at = time.monotonic()
            self.renderer.add(rendering)

    def _renderings(self, image: Image) -> list[Rendering]:
        """The image's, and its preview's if that is to be shown and came with the plan."""
        renderings = []
        if image.request.spec.partial_images and image.preview is None and image.plan and image.plan.preview:
            image.preview = image.plan.preview
            renderings.append(self.renderer_runner.prepare_preview(image))
        return [*renderings, self.renderer_runner.prepare(image)]

    def _start_preview(self, sequence: planning.Sequence) -> None:
        image, grid = sequence.image, sequence.request.spec.grids[0]
        image.preview = TokenGrid(grid.rows, grid.cols, self.planner_runner.read(sequence)[: grid.tokens])
        self.renderer.add(self.renderer_runner.prepare_preview(image))

    def _waits_for_preview(self, rendering: Rendering) -> bool:
        """Whether its preview, which is to be seen before it, is still being rendered."""
        own = (r for r in self.renderer if r.image is rendering.image)
        return not rendering.is_preview and any(r.is_preview for r in own)

    def _show(self, rendering: Rendering) -> None:
        pixels = self.renderer_runner.decode(rendering)
        self.metrics.partial_images.inc()
        self._events.append(Partial(rendering.image, rendering.partial_index, pixels, rendering.grid))
        rendering.shown = rendering.due

    def _finish_rendering(self, rendering: Rendering) -> None:
        self.renderer.remove(rendering)
        if not rendering.is_preview:
            self._finish_image(rendering)

    def _finish_image(self, rendering: Rendering) -> None:
        image, image.rendered_at = rendering.image, time.monotonic()
        pixels = self.renderer_runner.decode(rendering)
        image.decoded_at = time.monotonic()
        for late in [r for r in self.renderer if r.image is image]:
            self.renderer.remove(late)  # a preview of what is there already
        self.metrics.rendering.observe(image.rendered_at - image.planned_at)
        self.metrics.decoding.observe(image.decoded_at - image.rendered_at)
        self.metrics.images.inc()
        self.metrics.pixels.inc(image.request.spec.width * image.request.spec.height)
        self._events.append(Rendered(image, pixels))
        self._images_left[image.request] -= 1
        if not self._images_left[image.request]:
            del self._images_left[image.request]
            self.renderer_runner.release(image.request)
            self._events.append(Finished(image.request))

    def _progress(self, request: Request) -> Progress:
        spec = request.spec
        if not request.is_planned:
            total = spec.image_plan_tokens
            done = sum(total for image in request.images if image.plan)
            done += sum(s.written for s in self.planner.sequences if s.request is request)
            return Progress(request, "planning", done, total * spec.n)
        steps_left = sum(r.steps_left for r in self.renderer if r.request is request and not r.is_preview)
        return Progress(
            request, "rendering", spec.num_inference_steps * spec.n - steps_left, spec.num_inference_steps * spec.n
        )

    def _guarded(
        self, items: list[T], work: Callable[[list[T]], object], make_smaller: Callable[[], object] = lambda: None
    ) -> list[T]:
        """Do `work` on all items at once; if it raises, on each alone, and end the requests of those that fail alone.

        This is the one boundary between requests: `work` leaves the items as they were when it raises. A lost device
        is not a request's fault; that error goes up and ends the process.

        Args:
            make_smaller: called when memory was too little for all of them at once, and enough for each alone, so that
                the batches that follow do not fail like this one.

        Returns:
            The items whose work is done.
        """
        if not items:
            return []
        try:
            work(items)
            return items
        except Exception as error:
            if is_lost_device(error):
                raise
            lacks_memory = is_out_of_memory(error)
            if len(items) == 1:
                self._fail(items[0].request, error)
        if lacks_memory:  # only now: as long as the error lived, its frames held on to their tensors
            self.metrics.out_of_memory.labels("request" if len(items) == 1 else "batch").inc()
            self._empty_cache()
        if len(items) == 1:
            return []
        done = self._guarded_each(items, lambda item: work([item]))
        if lacks_memory and len(done) == len(items):
            make_smaller()
        return done

    def _guarded_each(self, items: Iterable[T], work: Callable[[T], object]) -> list[T]:
        """`work` on each item alone; a request that has failed is not tried again."""
        done: list[T] = []
        for item in items:
            if item.request in self._images_left:
                done += self._guarded([item], lambda one: work(one[0]))
        return done

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, PromptError):
            error = RequestError(str(error), param="prompt")
        traceback.clear_frames(error.__traceback__)  # the event lives on, and should not hold their tensors
        self._forget(request)
        self._events.append(Failed(request, error))

    def _forget(self, request: Request) -> None:
        """Give back everything a request holds."""
        del self._images_left[request]
        if request in self._waiting:
            self._waiting.remove(request)
        self.planner.abort(request)
        for rendering in [r for r in self.renderer if r.request is request]:
            self.renderer.remove(rendering)
        self.renderer_runner.release(request)

    def _empty_cache(self) -> None:
        """Give memory that the allocator keeps for itself back to the device, where other sizes can be cut from it."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
