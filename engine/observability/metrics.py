from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.jobs.job import TERMINAL_STATES

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
BATCH = (1, 2, 4, 8, 16, 32, 64)


class EngineMetrics:
    """Prometheus metrics of an engine. No label depends on a request."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        duration = partial(Histogram, buckets=SECONDS, registry=registry)
        step_duration = partial(Histogram, buckets=STEP_SECONDS, registry=registry)
        batch_size = partial(Histogram, buckets=BATCH, registry=registry)

        self.jobs = counter("glimmer_jobs", "Jobs this engine ended, by final state", ["state"])
        for state in TERMINAL_STATES:  # start at 0, or Prometheus misses the first increase
            self.jobs.labels(state.value)
        self.handed_over = counter("glimmer_jobs_handed_over", "Planned jobs that this engine handed over to renderers")
        self.result_store_failures = counter(
            "glimmer_result_store_failures", "Times the result store did not take the images of a job"
        )
        self.images = counter("glimmer_images", "Finished images")
        self.partial_images = counter("glimmer_partial_images", "Partial images rendered")
        self.plan_cache_hits = counter("glimmer_plan_cache_hits", "Images whose plan came from the plan cache")
        self.plans_resumed = counter("glimmer_plans_resumed", "Images whose plan came from an earlier run of their job")
        self.pixels = counter("glimmer_pixels", "Pixels of the finished images")
        self.queued = duration("glimmer_queued_seconds", "Time from submission to claim")
        self.planning = duration("glimmer_planning_seconds", "Time to plan an image")
        self.rendering = duration("glimmer_rendering_seconds", "Time to render an image, waiting included")
        self.decoding = duration("glimmer_decoding_seconds", "Time to decode the latents of an image to pixels")
        self.planner_step = step_duration("glimmer_planner_step_seconds", "Time of a planner step")
        self.planner_batch = batch_size("glimmer_planner_batch_size", "Sequences in a planner step")
        self.lookahead_rows = counter("glimmer_planner_lookahead_rows", "Guessed tokens that planner steps read")
        self.pass_tokens = batch_size("glimmer_planner_accepted_tokens", "Tokens that a planner step added to a plan")
        self.planner_tokens = counter("glimmer_planner_tokens", "Plan tokens generated")
        self.prompt_tokens = counter("glimmer_planner_prompt_tokens", "Prompt tokens prefilled")
        self.kernel_fallbacks = gauge(
            "glimmer_kernel_fallbacks",
            "1 for kernels that failed the check at the start and are not used",
            ["kernel"],
        )
        self.renderer_step = step_duration("glimmer_renderer_step_seconds", "Time of a renderer step")
        self.renderer_rows = batch_size("glimmer_renderer_rows", "Sequences packed into a renderer step")
        self.renderer_tokens = counter("glimmer_renderer_tokens", "Tokens of the packed sequences")
        self.renderer_padding = counter("glimmer_renderer_padding_tokens", "Padding tokens computed")
        self.out_of_memory = counter(
            "glimmer_out_of_memory",
            "Times the device was out of memory: for a batch, which was split, or for a request, which failed",
            ["whose"],
        )
        for whose in ("batch", "request"):
            self.out_of_memory.labels(whose)
        self.render_token_budget = gauge("glimmer_render_token_budget", "Current token limit of a renderer step")
        self.kv_blocks_used = gauge("glimmer_kv_blocks_used", "Key/value cache blocks in use")
        self.kv_blocks = gauge("glimmer_kv_blocks", "Key/value cache blocks in total")

    def exposition(self) -> str:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
