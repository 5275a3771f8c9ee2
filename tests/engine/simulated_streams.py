"""A device that works later than it is told to, and notices races.

Tensors are computed at once, on the CPU. What the device would have finished is decided by chance, within the order
of lanes; a copy to the host has wrong values until then.
"""

import random
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.streams import PRIORITIES, Lane, Mark

Clock = dict[Lane, int]  # by lane: number of its last operation that is known to be over


def later(*clocks: Clock) -> Clock:
    return {lane: max(clock.get(lane, 0) for clock in clocks) for lane in PRIORITIES}


@dataclass(eq=False)
class SimulatedMark:
    streams: "SimulatedStreams"
    lane: Lane
    clock: Clock
    after: list["SimulatedMark"]
    copies: list[tuple[Tensor, Tensor]]
    has_run: bool = False

    @property
    def is_reached(self) -> bool:
        self.streams.raise_if_broken()
        is_next = not self.has_run and all(mark.is_reached for mark in self.after)
        if is_next and self.streams.chance.random() < self.streams.speed:
            self.run()
        if self.has_run:
            self.streams.host = later(self.streams.host, self.clock)
        return self.has_run

    def wait(self) -> None:
        self.streams.raise_if_broken()
        self.streams.log.append(("wait", self.lane))
        self.run()
        self.streams.host = later(self.streams.host, self.clock)

    def run(self) -> None:
        """Let the device come here."""
        for mark in self.after:
            mark.run()
        if not self.has_run:
            self.has_run = True
            self.streams.log.append(("done", self.lane))
            with self.streams.on(None), torch.inference_mode():
                for source, target in self.copies:
                    target.copy_(source)
        self.after = []

    def seconds_since(self, earlier: Mark) -> float:
        assert self.has_run
        assert isinstance(earlier, SimulatedMark)
        assert earlier.has_run
        return 0.01


@dataclass(eq=False)
class SimulatedStreams:
    """Streams of a device that reaches a mark at a query with probability `speed`."""

    chance: random.Random
    speed: float = 0.3
    ticks_ahead: int = 1
    error: Exception | None = None  # that every query raises
    log: list[tuple[str, Lane]] = field(default_factory=list)
    host: Clock = field(default_factory=dict)
    known: dict[Lane, Clock] = field(default_factory=lambda: defaultdict(dict))
    count: dict[Lane, int] = field(default_factory=lambda: defaultdict(int))
    kept: set[tuple[int, Lane]] = field(default_factory=set)
    lane: Lane | None = None
    _last: dict[Lane, SimulatedMark] = field(default_factory=dict)
    _before: dict[Lane, list[SimulatedMark]] = field(default_factory=lambda: defaultdict(list))
    _copies: dict[Lane, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def raise_if_broken(self) -> None:
        if self.error is not None:
            raise self.error

    def begin(self) -> None:
        assert self.lane is None

    @contextmanager
    def on(self, lane: Lane | None) -> Iterator[None]:
        before, self.lane = self.lane, lane
        try:
            yield
        finally:
            self.lane = before

    def mark(self, lane: Lane) -> Mark:
        return self._mark(lane)

    def _mark(self, lane: Lane) -> SimulatedMark:
        self.log.append(("mark", lane))
        after = [*self._before.pop(lane, []), *([self._last[lane]] if lane in self._last else [])]
        self.count[lane] += 1
        clock = later(self.known[lane], self.host, {lane: self.count[lane]})
        self._last[lane] = SimulatedMark(self, lane, clock, after, self._copies.pop(lane, []))
        return self._last[lane]

    def follow(self, lane: Lane, leader: Lane) -> None:
        self.wait_for(lane, self._mark(leader))

    def wait_for(self, lane: Lane, mark: Mark) -> None:
        assert isinstance(mark, SimulatedMark)
        self.log.append(("wait for " + mark.lane, lane))
        self._before[lane].append(mark)
        self.known[lane] = later(self.known[lane], mark.clock)

    def keep(self, tensor: Tensor | None, lane: Lane) -> None:
        if tensor is not None:
            self.kept.add((place(tensor), lane))

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        assert self.lane is not None
        host = ~tensor if tensor.dtype == torch.bool else 255 - tensor
        self._copies[self.lane].append((tensor, host))
        return host


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _may_be_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@dataclass
class _Memory:
    owner: Lane | None  # the lane that allocated it
    writer: tuple[Lane, int] | None = None
    readers: Clock = field(default_factory=dict)


class Races(TorchDispatchMode):
    """Notices memory that a lane uses while another may still write, read or free it."""

    def __init__(self, streams: SimulatedStreams):
        super().__init__()
        self.found: set[str] = set()
        self.shared = 0  # uses of another lane's memory
        self._streams, self._memory = streams, dict[int, _Memory]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        streams, lane = self._streams, self._streams.lane
        if lane is None:
            return func(*args, **kwargs)
        streams.count[lane] += 1
        streams.known[lane] = later(streams.known[lane], streams.host)
        read, written = dict[int, Tensor](), dict[int, Tensor]()
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *(
            (argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs
        )]:  # fmt: skip
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel():  # scalars may be the host's
                    (written if is_written else read)[place(leaf)] = leaf
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.numel()]
        if _may_be_view(func) and all(place(leaf) in read for leaf in outputs):
            return out  # it touched no memory
        for at, leaf in (read | written).items():
            if at not in self._memory:
                self._add(leaf, _Memory(None))
            self._check(at, lane, at in written, str(func))
        for leaf in outputs:
            if place(leaf) not in read | written:
                self._add(leaf, _Memory(lane, (lane, streams.count[lane])))
        return out

    def _add(self, tensor: Tensor, memory: "_Memory") -> None:
        at = place(tensor)
        self._memory[at] = memory
        self._streams.kept -= {(at, lane) for lane in PRIORITIES}
        weakref.finalize(tensor.untyped_storage(), self._free, at, memory)

    def _free(self, at: int, memory: "_Memory") -> None:
        if self._memory.get(at) is memory:
            del self._memory[at]

    def _check(self, at: int, lane: Lane, is_written: bool, name: str) -> None:
        memory = self._memory[at]
        known, now = self._streams.known[lane], self._streams.count[lane]
        if memory.owner not in (None, lane):
            self.shared += 1
            if (at, lane) not in self._streams.kept:
                self.found.add(f"{lane} uses memory of {memory.owner}, which may free it: {name}")
        if memory.writer and memory.writer[0] != lane and known.get(memory.writer[0], 0) < memory.writer[1]:
            self.found.add(f"{lane} uses what {memory.writer[0]} may not have written yet: {name}")
        if is_written:
            for other, count in memory.readers.items():
                if other != lane and known.get(other, 0) < count:
                    self.found.add(f"{lane} writes what {other} may still read: {name}")
            memory.writer = lane, now
        else:
            memory.readers[lane] = now
