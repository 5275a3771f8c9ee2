from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.device_copies import begin_download


class CudaGraphs:
    """Captures work of a CUDA device. All graphs share a memory pool: they run one after another."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Run `work` once, which compiles kernels and makes libraries choose theirs, then capture it."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay

    def copy(self, tensor: Tensor) -> Callable[[], list[Any]]:
        """Begin a copy to the host; return what waits for it."""
        host = begin_download(tensor)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

        def read() -> list[Any]:
            event.synchronize()
            return host.tolist()

        return read

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Copy from pinned memory, which torch keeps until it is copied."""
        target.copy_(source.pin_memory(), non_blocking=True)
