"""No torch: the API imports this."""


class GlimmerError(Exception):
    """Base class."""


class StartError(GlimmerError):
    """A restart would not help; the message is for the operator."""


class RequestError(GlimmerError):
    """A retry would fail, too.

    Args:
        message: says what would be accepted.
        param: the field.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class QueueFull(GlimmerError):
    """Queued jobs are at their cap."""


class SourcesFull(QueueFull):
    """Queued source images are at their cap."""


class ResultsFull(QueueFull):
    """Records and results are at their cap."""


class TooManyJobs(GlimmerError):
    """One owner's jobs are at their cap."""


class TooMuchKept(TooManyJobs):
    """One owner's jobs and results are at their cap."""


class KeyReused(GlimmerError):
    """The idempotency key belongs to another request."""


class DeadlinePassed(GlimmerError):
    """The deadline passed before work began."""


class WriteRefused(GlimmerError):
    """Redis keeps refusing a large write."""


class UnreadableJob(GlimmerError):
    """The stored job is damaged."""


class QueueUnavailable(GlimmerError):
    """Redis cannot be reached, or answers with an error."""


class StoreUnavailable(QueueUnavailable):
    """The object storage of results cannot be reached, or refuses."""


class StoreMissing(GlimmerError):
    """A result is in object storage, of which this process has no setting."""


class StoreFailed(GlimmerError):
    """The object storage took no image for so long that the job was given up."""


class QueueReadOnly(QueueUnavailable):
    """Redis refuses writes: memory or disk full, or a replica."""
