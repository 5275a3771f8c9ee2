"""Errors of checkpoints and inputs."""


class CheckpointError(Exception):
    """A checkpoint cannot be loaded."""


class PromptError(ValueError):
    """A prompt is not accepted."""


class SourceImageError(ValueError):
    """A source image is not accepted."""


class NonFiniteError(ArithmeticError):
    """A network's output is infinite or not a number."""
