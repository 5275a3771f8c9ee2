"""Settings of the API process. Every field is also read from the environment: `GLIMMER_` and its name in capitals."""

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import LogLevel
from engine.geometry import MAX_SIDE


class ServerSettings(BaseSettings):
    """What the API process is told. Times are seconds, sizes bytes unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="GLIMMER_", frozen=True, extra="ignore")

    redis_url: str | None = Field(
        default=None, description="Where the jobs are; `glimmer serve` starts its own when unset."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: SecretStr | None = Field(
        default=None, description="Key that /v1 requests must carry; unset leaves /v1 open."
    )
    served_model_name: str = Field(
        default="glm-image",
        description="Names clients may use for the model, separated by commas; the first is the default.",
    )
    max_queue: int = Field(default=256, ge=0, description="Jobs that may wait; one more is answered with 429.")
    max_pixels: int = Field(default=MAX_SIDE * MAX_SIDE, ge=64 * 64, description="Largest picture, width times height.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Largest request body.")
    default_timeout: float = Field(
        default=600.0, gt=0, description="Time a job may take when the request does not say."
    )
    max_timeout: float = Field(default=3600.0, gt=0, description="The longest `timeout` a request may ask for.")
    grace_s: float = Field(default=30.0, ge=0, description="Time that running requests get to finish after SIGTERM.")
    log_level: LogLevel = Field(default="info", description="Events below it are not logged.")

    @field_validator("served_model_name")
    @classmethod
    def _names_something(cls, value: str) -> str:
        if not any(name.strip() for name in value.split(",")):
            raise ValueError("at least one model name is needed")
        return value

    @field_validator("redis_url", "api_key", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        """An empty variable is how compose files and shells say "not set"; an empty key must not open or close /v1."""
        return None if value == "" else value

    @property
    def model_names(self) -> list[str]:
        """The served names, the default first."""
        return [name.strip() for name in self.served_model_name.split(",") if name.strip()]
