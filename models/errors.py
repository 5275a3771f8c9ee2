"""Errors of checkpoints and inputs, and how to name those of libraries."""


class CheckpointError(Exception):
    """A checkpoint cannot be loaded."""


class PromptError(ValueError):
    """A prompt is not accepted."""


class SourceImageError(ValueError):
    """A source image is not accepted."""


class NonFiniteError(ArithmeticError):
    """A network's output is infinite or not a number."""


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
