"""What one engine process is told when it starts. No torch: the command line and the supervisor build it too."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["all"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

EXIT_CONFIGURATION = 2
"""Exit code of an engine that cannot start with these settings; restarting it unchanged will not help."""

EXIT_STUCK = 3
"""Exit code of an engine whose device does not come back from a step; a new process may do better."""

HAND_BACK_S = 5.0
"""Seconds that whoever stops an engine must wait beyond its grace period before killing it: only when that is over does
the engine start to hand back the jobs that are left, and each takes a call to a Redis that may be slow."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of one engine process. A field left at None is chosen by the engine from the checkpoint and the device.

    Args:
        redis_url: where the jobs are, for example `redis://host:6379/0` or `unix:///path/redis.sock`.
        engine_id: name of this incarnation, and of its consumer in the queue; never used twice.
        model: a checkpoint folder or a hub id; None takes the checkpoint that is shipped.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (bfloat16 on CUDA, float32 on CPU), `float32` or `bfloat16`.
        stage: `all`: this process plans and renders. Planners and renderers apart do not exist yet.
        lease_s: seconds a claimed job stays ours without a renewal; a dead engine's jobs wait this long.
        max_images: images in flight at most.
        max_prompt_tokens: a longer prompt is refused.
        kv_tokens: tokens the planner's KV cache holds.
        render_token_budget: packed tokens of one renderer tick at most.
        plan_cache_s: seconds a plan is kept for requests that would be planned the same; 0 keeps none.
        grace_s: seconds that running jobs may take to finish after SIGTERM; then they are handed back.
        log_level: events below it are not logged.
        log_format: how a line is written, `text` or `json`.
    """

    redis_url: str
    engine_id: str
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    stage: Stage = "all"
    lease_s: float = 10.0
    max_images: int | None = None
    max_prompt_tokens: int = 2048
    kv_tokens: int | None = None
    render_token_budget: int | None = None
    plan_cache_s: int = 3600
    grace_s: float = 30.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
