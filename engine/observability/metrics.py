"""What an engine counts, as Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.jobs.job import TERMINAL_STATES

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
BATCH = (1, 2, 4, 8, 16, 32, 64)


class EngineMetrics:
    """The metrics of one engine, in a registry of their own; no label depends on a request."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.jobs = Counter("glimmer_jobs", "Jobs this engine ended, by end state", ["state"], registry=registry)
        for state in TERMINAL_STATES:  # from 0, or Prometheus does not see the first one
            self.jobs.labels(state.value)
        self.images = Counter("glimmer_images", "Images made", registry=registry)
        self.partial_images = Counter(
            "glimmer_partial_images", "Pictures shown of images on their way", registry=registry
        )
        self.plan_cache_hits = Counter(
            "glimmer_plan_cache_hits", "Images whose plan was kept from an earlier request", registry=registry
        )
        self.plans_resumed = Counter(
            "glimmer_plans_resumed", "Images whose plan was kept from an earlier run of their job", registry=registry
        )
        self.pixels = Counter("glimmer_pixels", "Pixels of the images made", registry=registry)
        self.queued = Histogram(
            "glimmer_queued_seconds", "From submission to claim", buckets=SECONDS, registry=registry
        )
        self.planning = Histogram(
            "glimmer_planning_seconds", "Planning of an image", buckets=SECONDS, registry=registry
        )
        self.rendering = Histogram(
            "glimmer_rendering_seconds", "Rendering of an image, waiting included", buckets=SECONDS, registry=registry
        )
        self.decoding = Histogram(
            "glimmer_decoding_seconds", "Latents of an image to pixels", buckets=SECONDS, registry=registry
        )
        self.planner_step = Histogram(
            "glimmer_planner_step_seconds", "A planner step", buckets=STEP_SECONDS, registry=registry
        )
        self.planner_batch = Histogram(
            "glimmer_planner_batch_size", "Sequences of a planner step", buckets=BATCH, registry=registry
        )
        self.planner_tokens = Counter("glimmer_planner_tokens", "Plan tokens written", registry=registry)
        self.prompt_tokens = Counter("glimmer_planner_prompt_tokens", "Prompt tokens prefilled", registry=registry)
        self.renderer_step = Histogram(
            "glimmer_renderer_step_seconds", "A renderer tick", buckets=STEP_SECONDS, registry=registry
        )
        self.renderer_rows = Histogram(
            "glimmer_renderer_rows", "Rows packed in a renderer tick", buckets=BATCH, registry=registry
        )
        self.renderer_tokens = Counter("glimmer_renderer_tokens", "Tokens of the rows packed", registry=registry)
        self.renderer_padding = Counter("glimmer_renderer_padding_tokens", "Padding computed", registry=registry)
        self.out_of_memory = Counter(
            "glimmer_out_of_memory",
            "Times that device memory was too little: for a batch, which was split, or for a request, which failed",
            ["whose"],
            registry=registry,
        )
        for whose in ("batch", "request"):
            self.out_of_memory.labels(whose)
        self.render_token_budget = Gauge(
            "glimmer_render_token_budget", "Tokens a renderer tick may have now", registry=registry
        )
        self.kv_blocks_used = Gauge("glimmer_kv_blocks_used", "Key/value cache blocks in use", registry=registry)
        self.kv_blocks = Gauge("glimmer_kv_blocks", "Key/value cache blocks in all", registry=registry)

    def exposition(self) -> str:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
