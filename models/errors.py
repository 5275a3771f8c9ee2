"""What can be wrong with a checkpoint or with what is put into a model."""


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded; the message names the files or keys at fault."""


class PromptError(ValueError):
    """A prompt the model cannot take; the message says why, to the person who wrote it."""


class SourceImageError(ValueError):
    """A picture the model cannot take; the message says why, to the person who sent it."""
