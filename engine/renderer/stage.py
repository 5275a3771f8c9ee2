import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from engine.admitted import AdmittedRequests
from engine.batch_limit import BatchLimit
from engine.errors import RequestError
from engine.fault_boundary import FaultBoundary
from engine.geometry import MAX_SIDE, PATCH
from engine.limits import EngineLimits
from engine.observability.logs import event
from engine.observability.metrics import EngineMetrics
from engine.quotes import check_quoted_strings
from engine.renderer.calibration import calibrated_budget
from engine.renderer.in_flight import Decodings, Ticks
from engine.renderer.rendering import Rendering
from engine.renderer.runner import RendererRunner
from engine.renderer.scheduler import RenderScheduler
from engine.request import Event, Finished, Image, Partial, Progress, Rendered, Request
from engine.streams import Streams
from models.glm_image.model import GlmImage

DECODED_PIXELS = 1 << 20  # of a step; further images wait
LARGEST_TICK = 2 * (MAX_SIDE // PATCH) ** 2  # tokens of one image, both branches
TICK_WIDTHS = 9  # of the network, alive at once for each token

logger = logging.getLogger("glimmer.engine")


class RendererStage:
    """Step-level batching of images whose plan is known.

    Args:
        emit: gets `Partial`, `Rendered` and, at the end, `Finished`.
    """

    def __init__(
        self,
        model: GlmImage,
        limits: EngineLimits,
        metrics: EngineMetrics,
        boundary: FaultBoundary,
        streams: Streams,
        emit: Callable[[Event], None],
    ):
        self.scheduler: RenderScheduler[Rendering] = RenderScheduler(limits.render_token_budget)
        self.runner = RendererRunner(model, streams)
        self.tick_seconds = 0.0  # of the last one
        self._streams, self._codebook_size = streams, model.renderer.config.prior_vq_quantizer_codebook_size
        self._metrics, self._boundary, self._emit = metrics, boundary, emit
        self._admitted, self._limits = AdmittedRequests(limits.source_patches), limits
        self._ticks = Ticks(streams)
        self._partials: list[Rendering] = []  # as they were at their steps; they wait for their previews
        self._undecoded: deque[Rendering] = deque()  # whose last step is launched
        self._decodings = Decodings(streams, self.runner)
        for kernel in self.runner.fallbacks:
            metrics.kernel_fallbacks.labels(kernel).set(1)
        metrics.render_token_budget.set_function(lambda: self.scheduler.token_limit.current)

    def bound_decoding(self, free: int) -> None:
        """Decode as a whole what fits into `free` bytes, beside source images and the largest tick."""
        limits, config, itemsize = self._limits, self.runner.renderer.config, self.runner.model.dtype.itemsize
        tick = max(limits.render_token_budget, LARGEST_TICK) * TICK_WIDTHS * config.dim * itemsize
        autoencoder = self.runner.model.autoencoder
        autoencoder.limit_memory(free - tick - limits.source_patches * config.kv_bytes_per_token(itemsize))
        if autoencoder.max_pixels < MAX_SIDE**2:
            event(logger, "large_images_decoded_in_tiles", pixels=autoencoder.max_pixels)

    def calibrate(self, folder: Path | None) -> None:
        """Fill ticks up to what `calibrated_budget` finds, at most twice the limits' budget."""
        with self._streams.on("renderer"):
            self.runner.warm_up()
            budget = calibrated_budget(self.runner, self._streams, 2 * self._limits.render_token_budget, folder)
        self.scheduler.token_limit = BatchLimit(budget)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing renders; admitted requests may still be in planning."""
        return not len(self.scheduler) and not self._undecoded and not len(self._decodings)

    @property
    def seconds_left(self) -> float:
        """Estimate the time for all current renderings."""
        return self.scheduler.seconds_left

    def check(self, request: Request) -> None:
        """Raise RequestError if even an idle stage could not render it."""
        check_request(request, self._admitted.max_source_patches, self._codebook_size)

    def fits(self, request: Request) -> bool:
        """Return whether its source images fit in memory."""
        return self._admitted.fits(request)

    def reserve(self, request: Request) -> None:
        """Reserve memory for source images."""
        self._admitted.add(request)

    def admit(self, request: Request) -> None:
        """Render the planned images of a reserved and prepared request, or the preview that it is for."""
        if request.preview:
            request.images[0].preview = request.preview
            self.render_preview(request.images[0])
        self._render([image for image in request.images if image.plan])

    def render(self, image: Image) -> None:
        """Render a planned image of an admitted request."""
        self._render([image])

    def render_preview(self, image: Image) -> None:
        """Render an image's preview."""
        with self._streams.on("renderer"):
            self.scheduler.add(self.runner.prepare_preview(image))

    def step(self, may_wait: bool = True) -> None:
        """Launch a denoising step of a batch; decode what is due; report what the device has finished.

        Args:
            may_wait: for work in flight, if there is nothing to launch.
        """
        with self._streams.on("renderer"):
            self.runner.warm_up()
            self._collect()
            if batch := self.scheduler.pick():
                self._advance(batch)
            elif may_wait and not self._undecoded and not self._ticks.wait():
                self._decodings.wait()
            self._decode_finished()
            self._collect()

    def is_due(self, since: float) -> bool:
        """Return whether a tick should be launched after planner steps since then.

        On a CPU, they have taken as long as a tick; else the device would have none to run next.
        """
        if self._streams.ticks_ahead:
            return self._ticks.has_room
        return time.monotonic() - since >= self.tick_seconds

    def _advance(self, batch: list[Rendering]) -> None:
        tokens, sequences = sum(r.tokens for r in batch), sum(len(r.branches) for r in batch)
        self._decodings.precede_tick()
        begun = self._ticks.begin()
        advanced = self._boundary.run(batch, self.runner.advance, lambda: self.scheduler.token_limit.ran_out(tokens))
        self._ticks.add(advanced, tokens, begun)
        self._metrics.renderer_rows.observe(sequences)
        self._metrics.renderer_tokens.inc(tokens)
        self._metrics.renderer_padding.inc(self.runner.padding(tokens))
        self._collect_ticks()
        for rendering in advanced:
            if rendering.has_partial_due:
                self._partials.append(replace(rendering))
                rendering.partials_sent = rendering.partials_due
            if not rendering.steps_left and rendering.request in self._boundary.live:
                self.scheduler.remove(rendering)
                if not rendering.is_preview:
                    self._undecoded.append(rendering)
        self._decode_partials()

    def _collect(self) -> None:
        """Report what is done. A tick ends before what is decoded after it, so it is looked at last."""
        decoded = self._decodings.take_finished()
        self._collect_ticks()
        self._boundary.run_each(decoded, lambda decoding: decoding.finish(decoding.read()))

    def _collect_ticks(self) -> None:
        for tick in self._ticks.take_finished():
            self.tick_seconds = tick.seconds
            self.scheduler.observe(tick.tokens, tick.seconds)
            self._metrics.renderer_step.observe(tick.seconds)

    def _decode_finished(self) -> None:
        """Begin to decode finished images, at least one, until they have `DECODED_PIXELS`."""
        pixels = 0
        while self._undecoded and pixels < DECODED_PIXELS:
            rendering = self._undecoded.popleft()
            pixels += rendering.patches * PATCH**2
            self._boundary.run_each([rendering], self._begin_image)

    def _decode_partials(self) -> None:
        """Begin to decode those whose preview has been."""
        waiting = {r.image for r in self.scheduler if r.is_preview}
        ready = sorted((r for r in self._partials if r.image not in waiting), key=lambda r: not r.is_preview)
        self._partials = [r for r in self._partials if r.image in waiting]
        self._boundary.run_each(ready, self._begin_partial)

    def abort(self, request: Request) -> None:
        """Free what the request holds."""
        self._admitted.discard(request)
        for rendering in [r for r in self.scheduler if r.request is request]:
            self.scheduler.remove(rendering)
        self._partials = [r for r in self._partials if r.request is not request]
        self._undecoded = deque(r for r in self._undecoded if r.request is not request)
        self._decodings.abort(request)
        self.runner.release(request)

    def progress(self, request: Request) -> Progress:
        """Count denoising steps."""
        steps_left = sum(r.steps_left for r in self.scheduler if r.request is request and not r.is_preview)
        steps = request.spec.num_inference_steps * request.spec.n
        return Progress(request, "rendering", steps - steps_left, steps)

    def check_integrity(self) -> None:
        """Raise AssertionError if memory leaked."""
        assert all(request in self._boundary.live for request in self._admitted)
        assert len(self._admitted) or (self.is_idle and not self._partials and not len(self.runner.source_kv))

    def _render(self, images: list[Image]) -> None:
        """Prepare all before adding any: a failure adds none."""
        with self._streams.on("renderer"):
            prepared = [rendering for image in images for rendering in self._prepare(image)]
        for rendering in prepared:
            rendering.image.planned_at = time.monotonic()
            self.scheduler.add(rendering)

    def _prepare(self, image: Image) -> list[Rendering]:
        """Prepare the image, or first its preview, if it came with the plan and is wanted."""
        renderings = []
        if image.request.spec.partial_images and image.preview is None and image.plan and image.plan.preview:
            image.preview = image.plan.preview
            renderings.append(self.runner.prepare_preview(image))
        return [*renderings, self.runner.prepare(image)]

    def _begin_partial(self, rendering: Rendering) -> None:
        image, index, grid = rendering.image, rendering.partial_index, rendering.grid

        def finish(pixels: Tensor) -> None:
            self._metrics.partial_images.inc()
            self._emit(Partial(image, index, pixels, grid))
            if image.request.preview:
                self._finish_one(image.request)

        self._decodings.begin(rendering, finish)

    def _begin_image(self, rendering: Rendering) -> None:
        image = rendering.image
        self._decodings.begin(rendering, lambda pixels: self._finish_image(image, pixels))
        for preview in [r for r in self.scheduler if r.image is image]:
            self.scheduler.remove(preview)  # the image itself is ready
        self._partials = [r for r in self._partials if r.image is not image]

    def _finish_image(self, image: Image, pixels: Tensor) -> None:
        image.decoded_at = time.monotonic()
        self._metrics.rendering.observe(image.rendered_at - image.planned_at)
        self._metrics.decoding.observe(image.decoded_at - image.rendered_at)
        self._metrics.images.inc()
        self._metrics.pixels.inc(image.request.spec.width * image.request.spec.height)
        self._emit(Rendered(image, pixels))
        self._finish_one(image.request)

    def _finish_one(self, request: Request) -> None:
        if self._admitted.finish_image(request):
            self.runner.release(request)
            self._emit(Finished(request))


def check_request(request: Request, max_source_patches: int, codebook_size: int) -> None:
    """Raise RequestError for a request that no renderer takes."""
    spec = request.spec
    check_quoted_strings("prompt", spec.prompt, spec.quotes)
    check_quoted_strings("negative_prompt", spec.negative_prompt, spec.quotes)
    _check_sources(request, max_source_patches)
    for image in request.images:
        _check_plan(image, codebook_size)


def _check_sources(request: Request, max_patches: int) -> None:
    if len(request.preprocessed) != request.spec.num_sources:
        raise RequestError(f"this edit of {request.spec.num_sources} images came with {len(request.preprocessed)}")
    if request.source_patches > max_patches:
        raise RequestError(
            f"the source images have {request.source_patches * PATCH**2} pixels, as the model sees them; this server "
            f"has room for {max_patches * PATCH**2}. Send fewer or smaller images",
            param="image",
        )


def _check_plan(image: Image, codebook_size: int) -> None:
    plan, grid = image.plan, image.request.spec.geometry.plan
    if plan is None:
        return
    if (plan.rows, plan.cols, len(plan.tokens)) != (grid.rows, grid.cols, grid.tokens):
        raise RequestError(f"a plan of this size has {grid.rows} rows and {grid.cols} columns", param="plan")
    if not all(0 <= token < codebook_size for token in plan.tokens):
        raise RequestError(f"the tokens of a plan are 0 to {codebook_size - 1}", param="plan")
