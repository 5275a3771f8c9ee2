"""Copies between host and device that the host does not wait for."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device: torch keeps the pinned memory until it is copied."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def begin_download(tensor: Tensor) -> Tensor:
    """Begin a copy of a CUDA tensor, valid when its stream has done it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
