"""What an exception tells: whether the device is gone, whether its memory was too little, and what the sender hears.

Torch has classes for both, but not everywhere: where a kernel or a library was started by other means, and in older
versions, the same comes as a plain RuntimeError, and only its text tells.
"""

import torch

from engine.errors import RequestError, WriteRefused
from engine.jobs.job import JobError, JobSpec

_DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "HIP error", "device-side assert", "Triton Error")
_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "hipErrorOutOfMemory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might have succeeded. The device is as good as before."""
    by_class = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return by_class or (isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY))


def is_lost_device(error: BaseException) -> bool:
    """Whether the device's context is broken: from then on whatever this process asks of it fails, whoever asks."""
    if is_out_of_memory(error):
        return False
    by_class = isinstance(error, torch.AcceleratorError)
    return by_class or (isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_ERRORS))


def told_of(error: Exception, spec: JobSpec) -> JobError:
    """What the sender of a request hears of its failure. Of what is not the request's doing: no more than that."""
    if isinstance(error, RequestError):
        return JobError(error.message, "invalid_request_error", error.code, error.param)
    if isinstance(error, WriteRefused):
        return JobError(
            f"The queue has no room for {_images(spec)} of {spec.width}x{spec.height}. {_less(spec)}, or for jpeg or "
            "webp.",
            code="result_too_large",
        )
    if is_out_of_memory(error):
        return JobError(
            f"The engine's device has not enough memory for {_images(spec)} of {spec.width}x{spec.height}. "
            f"{_less(spec)}.",
            code="out_of_memory",
        )
    return JobError("The engine failed on this request.", code="engine_error")


def _images(spec: JobSpec) -> str:
    return f"{spec.n} images" if spec.n > 1 else "an image"


def _less(spec: JobSpec) -> str:
    """What would take less room."""
    ways = ["a smaller size"]
    if spec.n > 1:
        ways.append("fewer images (n)")
    if spec.sources:
        ways.append("an edit of fewer or smaller pictures")
    return "Ask for " + " or ".join(ways)
