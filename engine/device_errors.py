"""Classify exceptions of a device: lost, or out of memory.

Torch has classes for both, but not everywhere: where a kernel or a library was started by other means, and in older
versions, the same comes as a plain RuntimeError, and only its text tells.
"""

import torch

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
