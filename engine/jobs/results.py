"""What a job brings: images, whole and partial, as engines make them and as they are read from Redis."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredObject:
    """An image in object storage: its key, and its size in bytes."""

    key: str
    size: int


@dataclass(frozen=True)
class ImageResult:
    """An image of a result; `stored` in place of its data, if that is in object storage."""

    data: bytes
    seed: int
    plan: dict[str, Any] | None = None
    stored: StoredObject | None = None


@dataclass(frozen=True)
class PartialImage:
    """Partial image `index` of image `image`, encoded; `grid`: preview or plan."""

    image: int
    index: int
    data: bytes
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class StoredPartial:
    """A `PartialImage` whose data, of `size` bytes, is still in Redis."""

    image: int
    index: int
    size: int
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobResult:
    """`prompt_tokens` include `source_tokens`."""

    images: list[ImageResult]
    prompt_tokens: int
    plan_tokens: int
    source_tokens: int = 0


@dataclass(frozen=True)
class StoredImage:
    """An image of a result in Redis, `data` if read, too; or in object storage, under `key`."""

    size: int
    seed: int
    plan: dict[str, Any] | None = None
    data: bytes | None = None
    key: str | None = None


@dataclass(frozen=True)
class StoredResult:
    """A `JobResult` whose images are still where they are stored."""

    images: list[StoredImage]
    prompt_tokens: int
    plan_tokens: int
    source_tokens: int = 0
