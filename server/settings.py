"""Settings of the API process and of `glimmer serve`.

Flags (`server.cli.options`), environment variables and docs/settings.md are made from these declarations and from those
in `engine.config`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import LogFormat, LogLevel, ResultStoreUrl
from engine.errors import StartError
from engine.geometry import MAX_SIDE

ENV_PREFIX = "GLIMMER_"

# What Kubernetes sets for a Service called glimmer or glimmer-...: GLIMMER_PORT=tcp://10.0.0.1:80
_SERVICE_LINK_NAME = re.compile(rf"{ENV_PREFIX}([A-Z0-9_]+_)?PORT(_\d+_(TCP|UDP|SCTP))?")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S*")

_HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(r"https?://[^/@\s]+")


@dataclass(frozen=True)
class Flag:
    """The flag of a setting that is not named after it; None if only the environment sets it."""

    name: str | None


_NO_FLAG = Flag(None)


class ServerSettings(BaseSettings):
    """Settings from arguments and `GLIMMER_*` variables. Times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    redis_url: str | None = Field(
        default=None, description="Redis that holds the jobs; `glimmer serve` starts one when unset."
    )
    redis_min_replicas: int = Field(
        default=0,
        ge=0,
        description="Replicas of Redis that must have a job before it is accepted; without so many the answer is 503.",
    )
    result_store: Annotated[ResultStoreUrl, _NO_FLAG] = None
    result_store_public_url: Annotated[str | None, _NO_FLAG] = Field(
        default=None,
        description="Endpoint of the object storage for clients, in image URLs; the APIs' own when unset.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: SecretStr | None = Field(
        default=None,
        description="Key that /v1 requests must carry, without limits; with no key set /v1 is open to everyone.",
    )
    api_keys_file: Annotated[Path | None, Flag("--api-keys")] = Field(
        default=None, description="TOML file of further keys and their limits, as `glimmer key` prints them."
    )
    cors_origins: str = Field(
        default="",
        description="Origins whose pages may use the API from a browser, separated by commas; * allows every page.",
    )
    allowed_hosts: Annotated[str, _NO_FLAG] = Field(
        default="",
        description="Host names under which a server without a key may be reached, besides addresses, local names and "
        "that of the public URL, separated by commas; *.example.org allows all names below, * every name.",
    )
    prompt_rewriter: str | None = Field(
        default=None,
        description="Base URL of an OpenAI-compatible chat API that enriches prompts, for example "
        "http://127.0.0.1:8001/v1; prompts stay unchanged when unset.",
    )
    prompt_rewriter_key: Annotated[SecretStr | None, _NO_FLAG] = Field(
        default=None, description="Key for the prompt rewriter."
    )
    prompt_rewriter_model: Annotated[str | None, _NO_FLAG] = Field(
        default=None, description="Model of the prompt rewriter; the endpoint chooses when unset."
    )
    served_model_name: str = Field(
        default="glm-image",
        description="Names that clients may use for the model, separated by commas; the first is the default.",
    )
    max_queue: int = Field(default=256, ge=0, description="Maximum number of waiting jobs; above it the answer is 429.")
    scale_to_zero: Annotated[bool, _NO_FLAG] = Field(
        default=False,
        description="Accept requests while a stage has no engine, once one was there: an autoscaler starts engines for "
        "the backlog.",
    )
    max_pixels: Annotated[int, _NO_FLAG] = Field(
        default=MAX_SIDE * MAX_SIDE, ge=64 * 64, description="Maximum width times height of an image."
    )
    max_body_bytes: Annotated[int, _NO_FLAG] = Field(
        default=2 * 2**20, ge=1024, description="Maximum body size of a generation request."
    )
    max_upload_bytes: Annotated[int, _NO_FLAG] = Field(
        default=32 * 2**20, ge=1024, description="Maximum body size of an edit request, all its images together."
    )
    max_source_bytes: Annotated[int, _NO_FLAG] = Field(
        default=2**30,
        ge=1,
        description="Maximum memory in Redis for the source images of all edits that wait or run; above it the answer "
        "is 429.",
    )
    max_inflight_bytes: Annotated[int, _NO_FLAG] = Field(
        default=256 * 2**20,
        ge=1,
        description="Maximum memory of an API process for requests that arrive and responses that are sent, half of it "
        "for one key; above it the answer is 503, or 429 for the key.",
    )
    max_result_bytes: Annotated[int | None, _NO_FLAG] = Field(
        default=None,
        ge=1,
        description="Maximum memory in Redis for the results of all jobs, kept ones and those to come; above it the "
        "answer is 503, and for a key that takes half of it 429. When unset 8 MiB for each of `max_queue` jobs, at "
        "least 2 GiB.",
    )
    public_url: Annotated[str | None, _NO_FLAG] = Field(
        default=None,
        description="Base URL of this server for clients, used in image URLs; taken from each request when unset.",
    )
    default_response_format: Annotated[Literal["b64_json", "url"], _NO_FLAG] = Field(
        default="b64_json", description="Response format of requests that name none: b64_json or url."
    )
    default_timeout: Annotated[float, _NO_FLAG] = Field(
        default=600.0, gt=0, description="Time limit of a job whose request names none."
    )
    max_timeout: Annotated[float, _NO_FLAG] = Field(
        default=3600.0, gt=0, description="Longest `timeout` that a request may ask for."
    )
    grace_s: float = Field(default=30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    drain_delay_s: float = Field(
        default=5.0,
        ge=0,
        description="Seconds after SIGTERM in which requests are still accepted while /health is 503, for balancers to "
        "notice; a part of the grace period, at most half of it. Ctrl+C skips it.",
    )
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"

    @field_validator("*", mode="before")
    @classmethod
    def _check_encoding(cls, value: object, info: ValidationInfo) -> object:
        """Refuse bytes of another encoding, except in a path: they fail later, in the middle of a request."""
        if isinstance(value, str) and info.field_name != "api_keys_file" and not _is_utf8(value):
            raise ValueError("the value is not valid UTF-8")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_kubernetes(cls, value: object) -> object:
        return cls.model_fields["port"].default if _SERVICE_LINK.fullmatch(str(value)) else value

    @field_validator("served_model_name")
    @classmethod
    def _check_model_names(cls, value: str) -> str:
        if not any(name.strip() for name in value.split(",")):
            raise ValueError("at least one model name is needed")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if origin != "*" and not (_ORIGIN.fullmatch(origin) and _is_printable_url(origin)):
                raise ValueError(
                    f"{origin} is not an origin; write it like https://example.org or http://localhost:3000"
                )
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: str) -> str:
        for name in filter(None, map(str.strip, value.split(","))):
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name} is not a host name; write it like images.example.org, without port")
        return value

    @field_validator("public_url", "result_store_public_url")
    @classmethod
    def _check_public_url(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"https?://[^/?#\s][^?#\s]*", value) and _is_printable_url(value)):
            raise ValueError("write it like https://images.example.org")
        return value and value.rstrip("/")

    @field_validator("prompt_rewriter")
    @classmethod
    def _check_rewriter_url(cls, value: str | None) -> str | None:
        if not value:
            return value
        import httpx  # slow to import, and every command imports these settings

        try:
            url = httpx.URL(value)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("write it like http://127.0.0.1:8001/v1, without the /chat/completions")
        return value

    @field_validator("prompt_rewriter_key")
    @classmethod
    def _check_rewriter_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch("[!-~]+", value.get_secret_value()):
            raise ValueError("a key takes printable ASCII characters without spaces and line breaks")
        return value

    @field_validator(
        "redis_url",
        "api_key",
        "api_keys_file",
        "max_result_bytes",
        "public_url",
        "result_store_public_url",
        "prompt_rewriter",
        "prompt_rewriter_key",
        "prompt_rewriter_model",
        mode="before",
    )
    @classmethod
    def _treat_empty_as_unset(cls, value: object) -> object:
        """Map "", with which compose files and shells unset a variable, to None. An empty key must not close /v1."""
        return None if value == "" else value

    @property
    def model_names(self) -> list[str]:
        """Return the served names, the default first."""
        return [name.strip() for name in self.served_model_name.split(",") if name.strip()]

    @property
    def result_bytes(self) -> int:
        """Return `max_result_bytes` or its default: 8 MiB hold an image of 1024x1024 in one key's half."""
        return self.max_result_bytes or max(2 * 2**30, self.max_queue * 8 * 2**20)

    @property
    def asks_for_keys(self) -> bool:
        """Return whether /v1 needs a key."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def known_hosts(self) -> list[str]:
        """Return the names of `allowed_hosts`."""
        return [name.strip() for name in self.allowed_hosts.split(",") if name.strip()]

    @property
    def allowed_origins(self) -> list[str]:
        """Return the origins of `cors_origins`."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


def _is_utf8(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_printable_url(value: str) -> bool:
    """Return whether the URL is ASCII without control characters, and its host and port can be read."""
    try:
        parts = urlsplit(value)
        return value.isascii() and value.isprintable() and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        return False


def is_service_link(name: str, value: str) -> bool:
    """Return whether a variable is not a setting but the address of a Kubernetes Service."""
    return bool(_SERVICE_LINK_NAME.fullmatch(name) and _SERVICE_LINK.fullmatch(value))


def default_data_dir() -> Path:
    """Return `$XDG_DATA_HOME/glimmer`, by default `~/.local/share/glimmer`; raise `StartError` without a home."""
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "glimmer"
    except RuntimeError:
        raise StartError("this user has no home folder; set --data-dir or GLIMMER_DATA_DIR") from None


class ServeSettings(BaseModel):
    """Further settings of `glimmer serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engines: int = Field(default=1, ge=1, le=256, description="Engine processes; with several GPUs one for each.")
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder of the queue; ~/.local/share/glimmer, or below XDG_DATA_HOME, when unset.",
    )
