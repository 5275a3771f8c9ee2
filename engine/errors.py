"""Errors of the queue and the engine. No torch.

GlimmerError
├── RequestError
├── QueueFull
│   └── SourcesFull
├── TooManyJobs
├── KeyReused
├── DeadlinePassed
├── WriteRefused
└── QueueUnavailable
    └── QueueReadOnly
"""


class GlimmerError(Exception):
    """Base."""


class RequestError(GlimmerError):
    """Retrying will not help.

    Args:
        message: names what would be accepted.
        param: the request field at fault.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class QueueFull(GlimmerError):
    """The queue is at its cap."""


class SourcesFull(QueueFull):
    """Queued source images are at their cap."""


class TooManyJobs(GlimmerError):
    """One owner's jobs are at their cap."""


class KeyReused(GlimmerError):
    """The idempotency key belongs to another request."""


class DeadlinePassed(GlimmerError):
    """The deadline passed before the work could begin."""


class WriteRefused(GlimmerError):
    """Redis keeps refusing one large write."""


class QueueUnavailable(GlimmerError):
    """Redis cannot be reached or refuses writes."""


class QueueReadOnly(QueueUnavailable):
    """Redis refuses writes: memory or disk full, or a replica."""
