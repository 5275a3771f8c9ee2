import time
from collections.abc import Callable
from itertools import accumulate

import torch

from engine.fault_boundary import FaultBoundary
from engine.jobs.job import Plan, TokenGrid
from engine.limits import EngineLimits
from engine.moving_average import MovingAverage
from engine.observability.metrics import EngineMetrics
from engine.planner.lookahead import LookAhead
from engine.planner.runner import PlannerRunner
from engine.planner.scheduler import PlannerScheduler, Sequence
from engine.request import Event, Image, Planned, Progress, Request
from models.glm_image.model import GlmImage
from models.glm_image.paged_attention import PagedKV
from models.glm_image.prompt import fill_in_codes, place_sources


class PlannerStage:
    """Continuous batching of plans over a paged cache.

    Args:
        on_preview: gets images whose preview is written and wanted.
        on_plan: gets planned images.
    """

    def __init__(
        self,
        model: GlmImage,
        limits: EngineLimits,
        metrics: EngineMetrics,
        boundary: FaultBoundary,
        emit: Callable[[Event], None],
        *,
        on_preview: Callable[[Image], None],
        on_plan: Callable[[Image], None],
    ):
        self.scheduler = PlannerScheduler(
            limits.blocks,
            limits.block_size,
            limits.max_sequences,
            limits.max_prompt_tokens,
            prefill_tokens=limits.prefill_tokens,
            chunk_tokens=limits.prefill_tokens,
        )
        self.runner = PlannerRunner(
            model.planner,
            PagedKV(model.planner.config, limits.blocks + 1, limits.block_size, model.dtype, model.device),
            model.sampling,
            max_sequences=limits.max_sequences,
            max_plan_tokens=limits.max_plan_tokens,
            max_positions=limits.max_positions,
            max_blocks=limits.max_sequence_blocks,
            min_rows=limits.min_planner_rows,
        )
        for kernel in self.runner.fallbacks:
            metrics.kernel_fallbacks.labels(kernel).set(1)
        self.look_ahead = LookAhead(self.runner.measure_passes())
        self._prompts, self._metrics, self._boundary = model.prompts, metrics, boundary
        self._emit, self._on_preview, self._on_plan = emit, on_preview, on_plan
        self._token_seconds = MovingAverage(0.0)  # of a plan
        metrics.kv_blocks.set(limits.blocks)
        metrics.kv_blocks_used.set_function(lambda: self.scheduler.allocator.used)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    @property
    def seconds_left(self) -> float:
        """Estimate the time for all admitted plans."""
        return self.scheduler.steps_left * (self._token_seconds.value or 0.0)

    def check(self, request: Request) -> None:
        """Tokenize the prompt.

        Raises:
            PromptError: it contains control tokens.
            RequestError: even an idle stage cannot plan it.
        """
        spec, geometry = request.spec, request.spec.geometry
        self.scheduler.check_length("negative_prompt", self._prompts.count(spec.negative_prompt))
        ids = self._prompts.encode(spec.prompt, geometry.canvas_height, geometry.canvas_width, spec.num_sources)
        grids = [(image.rows, image.cols) for image in request.preprocessed]
        request.prompt_ids, request.prompt_positions = place_sources(ids, self._prompts.image_token, grids)
        self.scheduler.check(request)

    def fits(self, request: Request) -> bool:
        """Return whether enough memory is free."""
        return self.scheduler.fits(request)

    def reserve(self, request: Request) -> None:
        """Reserve memory, unless the request is planned."""
        if not request.is_planned:
            self.scheduler.reserve(request)

    def admit(self, request: Request) -> None:
        """Schedule a reserved request, once its source images are encoded."""
        codes = torch.cat([source.codes.flatten() for source in request.encoded]).tolist() if request.encoded else []
        request.prompt_ids = fill_in_codes(request.prompt_ids, self._prompts.image_token, codes)
        if not request.is_planned:
            self.scheduler.admit(request)

    def step(self) -> None:
        """Prefill prompts; decode the other plans."""
        started = time.monotonic()
        scheduler, boundary, step = self.scheduler, self._boundary, self.scheduler.schedule()
        prompt_tokens, batch_size, first, decoded = step.prompt_tokens, len(step.decode), 0, 0
        self.look_ahead.share(step.decode, memory_is_short=scheduler.decode_limit.is_lowered)
        for group in boundary.run(
            step.prefill, self.runner.prefill, lambda: scheduler.prefill_limit.ran_out(prompt_tokens)
        ):
            first += len(group.sequences) * group.is_last_chunk
            self._metrics.prompt_tokens.inc(group.end - group.start)
            scheduler.mark_prefilled(group)
        boundary.run(step.decode, self.runner.decode, lambda: scheduler.decode_limit.ran_out(batch_size))
        for done in self.runner.take_passes():
            accepted = done.sequence.advance(done.rows, done.written)
            self._metrics.lookahead_rows.inc(done.rows - 1)
            self._metrics.pass_tokens.observe(accepted)
            decoded += accepted
        boundary.run_each(scheduler.sequences_with_new_preview(), self._finish_preview)
        boundary.run_each(scheduler.completed_sequences(), self._finish_plan)
        self._metrics.planner_batch.observe(batch_size)
        self._metrics.planner_tokens.inc(first + decoded)
        seconds = time.monotonic() - started
        self._token_seconds.add(seconds / max(1.0, decoded / (batch_size or 1)))
        self._metrics.planner_step.observe(seconds)

    def abort(self, request: Request) -> None:
        """Free what the request holds."""
        self.scheduler.abort(request)

    def progress(self, request: Request) -> Progress:
        """Count plan tokens."""
        tokens = request.spec.image_plan_tokens
        written = sum(tokens for image in request.images if image.plan)
        written += sum(s.written for s in self.scheduler.sequences if s.request is request)
        return Progress(request, "planning", written, tokens * request.spec.n)

    def check_integrity(self) -> None:
        """Raise AssertionError if memory leaked."""
        self.scheduler.check_integrity()

    def _finish_preview(self, sequence: Sequence) -> None:
        image, grid = sequence.image, sequence.request.spec.grids[0]
        image.preview = TokenGrid(grid.rows, grid.cols, self.runner.read(sequence)[: grid.tokens])
        self._on_preview(image)

    def _finish_plan(self, sequence: Sequence) -> None:
        image, grids = sequence.image, sequence.request.spec.grids
        tokens = self.runner.read(sequence)
        self.scheduler.finish(sequence)
        ends = accumulate(grid.tokens for grid in grids)
        *previews, plan = [
            TokenGrid(grid.rows, grid.cols, tokens[end - grid.tokens : end])
            for grid, end in zip(grids, ends, strict=True)
        ]
        image.plan = Plan(plan.rows, plan.cols, plan.tokens, previews[0] if previews else None)
        self._metrics.planning.observe(time.monotonic() - image.admitted_at)
        self._emit(Planned(image.request, image.index, image.plan))
        self._on_plan(image)
