"""Settings and exit codes of an engine process. No torch: the API imports this."""

import os
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from engine.jobs.job import Stage
from engine.jobs.result_store_url import check_result_store

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], Field(description="Events below this level are not logged.")
]
LogFormat = Annotated[Literal["text", "json"], Field(description="Format of a log line: text or json.")]

ResultStoreUrl = Annotated[
    str | None,
    BeforeValidator(check_result_store),
    Field(
        description="Object storage for the images of results, s3://bucket/prefix, the same for APIs and engines; "
        "Redis holds them when unset. Credentials, region and endpoint as in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_REGION and AWS_ENDPOINT_URL_S3."
    ),
]

EXIT_CONFIGURATION = 2
"""Exit code: the process cannot start with its settings; restarting it will not help."""

EXIT_STUCK = 3
"""Exit code: the device does not return from a step; a new process may do better."""

HAND_BACK_S = 5.0
"""Seconds between the end of an engine's grace period and its kill: it hands back each unfinished job with a call to a
Redis that may be slow."""


_NAMES = {
    "device": (r"auto|cpu|mps|xpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    "dtype": ("auto|float32|bfloat16", "auto, float32 or bfloat16"),
}

ENGINES_VARIABLE = "GLIMMER_ENGINES_OF_MACHINE"
"""Set by the supervisor, not by people: how many engines share this machine's memory."""


def new_engine_id() -> str:
    """Return a new, public id."""
    return f"engine-{os.urandom(8).hex()}"


class CheckpointSettings(BaseModel):
    """Checkpoint and device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None, description="Checkpoint folder or hub id; the small checkpoint that is shipped when unset."
    )
    device: str = Field(default="auto", description="auto (CUDA where available), cpu, cuda or cuda:N.")
    dtype: str = Field(default="auto", description="auto (bfloat16 on CUDA, float32 on CPU), float32 or bfloat16.")

    @field_validator("device", "dtype")
    @classmethod
    def _check_name(cls, value: str, info: ValidationInfo) -> str:
        """Refuse other names before torch is imported, which takes seconds."""
        pattern, accepted = _NAMES[str(info.field_name)]
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not known; expected {accepted}")
        return value


class EngineSettings(CheckpointSettings):
    """Settings of one engine. None: chosen by checkpoint and device.

    Not a `BaseSettings`: only the command line reads the environment.
    """

    redis_url: str = Field(
        description="Redis that holds the jobs: redis://host:6379/0, unix:///path, redis+sentinel:// or "
        "redis+cluster://."
    )
    engine_id: str = Field(
        default_factory=new_engine_id, description="Id of this process, never used before; generated when unset."
    )
    stage: Stage = Field(
        default="all",
        description="plan (it hands planned jobs over), render (it takes only those) or all; the other stage's weights "
        "are not loaded.",
    )
    result_store: ResultStoreUrl = None
    lease_s: float = Field(default=10.0, ge=1, description="Seconds after which the jobs of a dead engine are free.")
    max_images: int | None = Field(default=None, ge=1, description="Maximum number of images in flight.")
    max_prompt_tokens: int = Field(default=2048, ge=1, description="Maximum prompt length in tokens.")
    kv_tokens: int | None = Field(default=None, ge=1, description="Capacity of the planner's KV cache in tokens.")
    render_token_budget: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of packed tokens in one renderer step; measured when an engine first starts on a "
        "device if unset.",
    )
    min_planner_rows: int | None = Field(
        default=None,
        ge=1,
        description="Least number of rows in a planner step on a GPU; unset: always as many as the most images need, "
        "so that an image never depends on the load. Fewer: single images are a little faster.",
    )
    plan_cache_s: int = Field(
        default=3600, ge=0, description="Seconds a plan is kept for equal requests; 0 keeps none."
    )
    grace_s: float = Field(default=30.0, ge=0, description="Seconds that running jobs get to finish after SIGTERM.")
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
