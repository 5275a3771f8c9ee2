"""Classify exceptions of a device.

Other kernels and older torch versions raise a plain RuntimeError with a text.
"""

import torch

_DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "HIP error", "device-side assert", "Triton Error")
_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "hipErrorOutOfMemory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a smaller batch might succeed."""
    by_class = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return by_class or (isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY))


def is_lost_device(error: BaseException) -> bool:
    """Return whether all further work will fail."""
    if is_out_of_memory(error):
        return False
    by_class = isinstance(error, torch.AcceleratorError)
    return by_class or (isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_ERRORS))
