"""What can go wrong, as seen by the person who sent the request. No torch.

GlimmerError
├── RequestError        this request cannot be served as it is; retrying it unchanged will not help
├── QueueFull           the queue is at its cap; try again later
│   └── SourcesFull     the pictures of the edits in it take as much memory as they may
├── TooManyJobs         one owner has as many jobs in the queue as it may; try again later
├── KeyReused           an idempotency key came with two different requests
├── DeadlinePassed      nobody waits for the answer any more
├── WriteRefused        Redis takes other writes, but not what belongs to this request
└── QueueUnavailable    Redis is away or refuses writes; try again later

(A checkpoint that cannot be loaded is a `models.errors.CheckpointError`.)
"""


class GlimmerError(Exception):
    """Base of every error Glimmer raises on purpose."""


class RequestError(GlimmerError):
    """A request that cannot be served as it is.

    Args:
        message: written for the sender; names what would be accepted.
        param: the request field at fault, if one is.
        code: the error code of the HTTP contract, for example `invalid_value`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class QueueFull(GlimmerError):
    """The queue holds as many waiting jobs as it may."""


class SourcesFull(QueueFull):
    """The jobs in the queue have as many bytes of pictures to edit as they may."""


class TooManyJobs(GlimmerError):
    """The owner has as many jobs waiting and running as it may."""


class KeyReused(GlimmerError):
    """The idempotency key was used for another request."""


class DeadlinePassed(GlimmerError):
    """The deadline came before the work could begin."""


class WriteRefused(GlimmerError):
    """Redis takes small writes, and refuses one that is larger each time."""


class QueueUnavailable(GlimmerError):
    """Redis cannot be reached or does not accept writes."""


class QueueReadOnly(QueueUnavailable):
    """Redis answers and does not accept writes: its memory or its disk is full, or it has become a replica."""
