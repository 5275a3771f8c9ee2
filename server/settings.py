"""Settings of the API process. Every field is also read from the environment: `GLIMMER_` and its name in capitals."""

import re
from pathlib import Path
from typing import Literal

import httpx
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import LogFormat, LogLevel
from engine.geometry import MAX_SIDE

_ORIGIN = re.compile(r"https?://[^/@\s]+")


class ServerSettings(BaseSettings):
    """What the API process is told. Times are seconds, sizes bytes unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="GLIMMER_", frozen=True, extra="ignore")

    redis_url: str | None = Field(
        default=None, description="Where the jobs are; `glimmer serve` starts its own when unset."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: SecretStr | None = Field(
        default=None, description="Key that /v1 requests must carry, without limits; with no key set /v1 is open."
    )
    api_keys_file: Path | None = Field(
        default=None, description="TOML file of further keys and their limits, as `glimmer key` prints them."
    )
    cors_origins: str = Field(
        default="",
        description="Origins whose pages may use the API from a browser, separated by commas; * is every page.",
    )
    prompt_rewriter: str | None = Field(
        default=None,
        description="Base URL of an OpenAI-compatible chat API that makes prompts richer, for example "
        "http://127.0.0.1:8001/v1; unset leaves them as they are.",
    )
    prompt_rewriter_key: SecretStr | None = Field(default=None, description="Key for the prompt rewriter.")
    prompt_rewriter_model: str | None = Field(
        default=None, description="Model of the prompt rewriter; unset leaves it to the endpoint."
    )
    served_model_name: str = Field(
        default="glm-image",
        description="Names clients may use for the model, separated by commas; the first is the default.",
    )
    max_queue: int = Field(default=256, ge=0, description="Jobs that may wait; one more is answered with 429.")
    max_pixels: int = Field(default=MAX_SIDE * MAX_SIDE, ge=64 * 64, description="Largest picture, width times height.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Largest request body of a generation.")
    max_upload_bytes: int = Field(
        default=32 * 2**20, ge=1024, description="Largest request body of an edit, all its pictures together."
    )
    max_source_bytes: int = Field(
        default=2**30,
        ge=1,
        description="Memory in Redis for the pictures of edits that wait or run; one edit more is answered with 429.",
    )
    public_url: str | None = Field(
        default=None,
        description="Where clients reach this server, for the URLs of pictures; unset takes it from each request.",
    )
    default_response_format: Literal["b64_json", "url"] = Field(
        default="b64_json", description="How pictures are answered when the request does not say."
    )
    default_timeout: float = Field(
        default=600.0, gt=0, description="Time a job may take when the request does not say."
    )
    max_timeout: float = Field(default=3600.0, gt=0, description="The longest `timeout` a request may ask for.")
    grace_s: float = Field(default=30.0, ge=0, description="Time that running requests get to finish after SIGTERM.")
    log_level: LogLevel = Field(default="info", description="Events below it are not logged.")
    log_format: LogFormat = Field(default="text", description="How a line of the log is written: text or json.")

    @field_validator("served_model_name")
    @classmethod
    def _names_something(cls, value: str) -> str:
        if not any(name.strip() for name in value.split(",")):
            raise ValueError("at least one model name is needed")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin} is no origin; write it like https://example.org or http://localhost:3000")
        return value

    @field_validator("public_url")
    @classmethod
    def _is_public_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/?#\s][^?#\s]*", value):
            raise ValueError("write it like https://images.example.org")
        return value and value.rstrip("/")

    @field_validator("prompt_rewriter")
    @classmethod
    def _is_base_url(cls, value: str | None) -> str | None:
        try:
            url = httpx.URL(value or "http://unset")
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("write it like http://127.0.0.1:8001/v1, without the /chat/completions")
        return value

    @field_validator(
        "redis_url",
        "api_key",
        "api_keys_file",
        "public_url",
        "prompt_rewriter",
        "prompt_rewriter_key",
        "prompt_rewriter_model",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        """An empty variable is how compose files and shells say "not set"; an empty key must not open or close /v1."""
        return None if value == "" else value

    @property
    def model_names(self) -> list[str]:
        """The served names, the default first."""
        return [name.strip() for name in self.served_model_name.split(",") if name.strip()]

    @property
    def asks_for_keys(self) -> bool:
        """Whether /v1 is open to those with a key only."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def allowed_origins(self) -> list[str]:
        """The origins of `cors_origins`; none where cross-origin requests are not allowed."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]
