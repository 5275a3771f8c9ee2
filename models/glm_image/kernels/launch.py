from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


def next_power_of_2(n: int) -> int:
    """Round n up to a power of 2."""
    return 1 << (n - 1).bit_length()
