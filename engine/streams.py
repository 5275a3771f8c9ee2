"""Lanes of a device, filled by one thread.

A tensor belongs to the lane that allocated it. Others may use it after `follow`, and `keep` it.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.device_copies import begin_download

Lane = Literal["planner", "renderer", "decoder"]
PRIORITIES: dict[Lane, int] = {"planner": -2, "renderer": -1, "decoder": 0}  # lower numbers go first


class Mark(Protocol):
    """A point in a lane."""

    @property
    def is_reached(self) -> bool: ...

    def wait(self) -> None:
        """Block the host until the device is there. Raises what any lane failed with: see `is_lost_device`."""
        ...

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the time between reached marks of a lane."""
        ...


class Streams(Protocol):
    """`HostStreams`, `CudaStreams` or a stand-in."""

    ticks_ahead: int  # launched before one ends

    def begin(self) -> None:
        """Wait for what was launched in no lane."""
        ...

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """Launch in a lane."""
        ...

    def mark(self, lane: Lane) -> Mark:
        """Mark the end of a lane so far."""
        ...

    def follow(self, lane: Lane, leader: Lane) -> None:
        """Let a lane wait for the leader's work so far."""
        ...

    def wait_for(self, lane: Lane, mark: Mark) -> None:
        """Let a lane wait for a mark."""
        ...

    def keep(self, tensor: Tensor | None, lane: Lane) -> None:
        """Let a freed tensor's memory be reused only after `lane`'s work so far."""
        ...

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """Begin a copy, valid at the lane's next mark."""
        ...


class HostMark:
    """A time: a CPU's work is done at once."""

    is_reached = True

    def __init__(self) -> None:
        self._time = time.monotonic()

    def wait(self) -> None: ...

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self._time - earlier._time


class HostStreams:
    """Streams of a CPU."""

    ticks_ahead = 0

    def begin(self) -> None:
        """Do nothing, as other methods."""

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, lane: Lane) -> Mark:
        return HostMark()

    def follow(self, lane: Lane, leader: Lane) -> None: ...

    def wait_for(self, lane: Lane, mark: Mark) -> None: ...

    def keep(self, tensor: Tensor | None, lane: Lane) -> None: ...

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        return tensor


class CudaMark:
    def __init__(self, stream: torch.cuda.Stream):
        # `blocking` leaves the core to encoders.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    @property
    def is_reached(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark)
        return earlier.event.elapsed_time(self.event) / 1e3


class CudaStreams:
    """A stream per lane."""

    ticks_ahead = 1

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device, p) for lane, p in PRIORITIES.items()}

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[lane])

    def mark(self, lane: Lane) -> Mark:
        return CudaMark(self._streams[lane])

    def follow(self, lane: Lane, leader: Lane) -> None:
        self._streams[lane].wait_stream(self._streams[leader])

    def wait_for(self, lane: Lane, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self._streams[lane].wait_event(mark.event)

    def keep(self, tensor: Tensor | None, lane: Lane) -> None:
        if tensor is not None:
            tensor.record_stream(self._streams[lane])

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        return begin_download(tensor)


def streams_of(device: torch.device) -> Streams:
    """Return a device's streams."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
