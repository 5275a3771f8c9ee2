"""Errors of checkpoints and of model inputs."""


class CheckpointError(Exception):
    """A checkpoint cannot be loaded; the message names files or keys."""


class PromptError(ValueError):
    """The model cannot take a prompt; the message is for the client."""


class SourceImageError(ValueError):
    """The model cannot take a source image; the message is for the client."""
