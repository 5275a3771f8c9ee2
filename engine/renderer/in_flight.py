"""What is launched and not known to be over."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.renderer.rendering import Rendering
from engine.renderer.runner import RendererRunner
from engine.request import Request
from engine.streams import Mark, Streams

TICKS_BESIDE_DECODING = 2  # the next one waits until it is over


@dataclass(frozen=True)
class Tick:
    """A denoising step of a batch."""

    renderings: list[Rendering]
    tokens: int
    begun: Mark
    ended: Mark

    @property
    def seconds(self) -> float:
        return self.ended.seconds_since(self.begun)


@dataclass(eq=False)
class Decoding:
    """An image being decoded; `finish` gets what `read` returns at `done`."""

    rendering: Rendering
    read: Callable[[], Tensor]
    finish: Callable[[Tensor], None]
    done: Mark
    ticks: int = 0  # launched since

    @property
    def request(self) -> Request:
        return self.rendering.request


class Ticks:
    """One tick that runs, and `Streams.ticks_ahead`; oldest first."""

    def __init__(self, streams: Streams):
        self._streams = streams
        self._ticks: deque[Tick] = deque()

    @property
    def has_room(self) -> bool:
        """Return whether another may be launched without waiting."""
        return sum(not tick.ended.is_reached for tick in self._ticks) <= self._streams.ticks_ahead

    def begin(self) -> Mark:
        """Wait until another may be launched; mark its begin."""
        waited_for = len(self._ticks) - self._streams.ticks_ahead
        for tick in list(self._ticks)[: max(0, waited_for)]:
            tick.ended.wait()
        return self._streams.mark("renderer")

    def add(self, renderings: list[Rendering], tokens: int, begun: Mark) -> None:
        """Add a launched tick."""
        self._ticks.append(Tick(renderings, tokens, begun, self._streams.mark("renderer")))

    def take_finished(self) -> list[Tick]:
        """Remove ended ticks; note the time for their images."""
        finished: list[Tick] = []
        while self._ticks and self._ticks[0].ended.is_reached:
            finished.append(self._ticks.popleft())
            for rendering in finished[-1].renderings:
                rendering.image.rendered_at = time.monotonic()
        return finished

    def wait(self) -> bool:
        """Wait for the oldest; return whether there was one."""
        if self._ticks:
            self._ticks[0].ended.wait()
        return bool(self._ticks)


class Decodings:
    """Images in the decoder's lane, oldest first."""

    def __init__(self, streams: Streams, runner: RendererRunner):
        self._streams, self._runner = streams, runner
        self._decodings: deque[Decoding] = deque()

    def __len__(self) -> int:
        return len(self._decodings)

    def begin(self, rendering: Rendering, finish: Callable[[Tensor], None]) -> None:
        """Decode after all ticks so far."""
        streams = self._streams
        with streams.on("decoder"):
            streams.follow("decoder", "renderer")
            for tensor in (rendering.latents, rendering.velocity):
                streams.keep(tensor, "decoder")
            read = self._runner.decode(rendering)
            self._decodings.append(Decoding(rendering, read, finish, streams.mark("decoder")))

    def precede_tick(self) -> None:
        """Let the next tick wait for what is late."""
        for decoding in self._decodings:
            if decoding.ticks == TICKS_BESIDE_DECODING:
                self._streams.wait_for("renderer", decoding.done)
            decoding.ticks += 1

    def take_finished(self) -> list[Decoding]:
        """Remove what is decoded, in order."""
        finished: list[Decoding] = []
        while self._decodings and self._decodings[0].done.is_reached:
            finished.append(self._decodings.popleft())
        return finished

    def wait(self) -> None:
        """Wait for the oldest."""
        if self._decodings:
            self._decodings[0].done.wait()

    def abort(self, request: Request) -> None:
        """Forget a request's."""
        self._decodings = deque(decoding for decoding in self._decodings if decoding.request is not request)
