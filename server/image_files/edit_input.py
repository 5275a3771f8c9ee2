"""The files of an edit, before and after decoding. Light: decoder processes import it."""

from dataclasses import dataclass

from engine.jobs.job import SourceImages


class InvalidImage(Exception):
    """A file of the field `param` cannot be used."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param, self.message = param, message


@dataclass(frozen=True)
class EditFiles:
    """The uploaded files of an edit.

    Args:
        size: of the edit; None for the first image's, on the 32-pixel grid.
        max_pixels: larger images are scaled down.
    """

    images: list[bytes]
    mask: bytes | None
    size: tuple[int, int] | None
    max_pixels: int


@dataclass(frozen=True)
class EditInput:
    """The decoded files of an edit; `tokens` is an upper bound of their prompt tokens."""

    size: tuple[int, int]
    tokens: int
    source_images: SourceImages
