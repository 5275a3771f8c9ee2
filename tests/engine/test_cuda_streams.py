"""How streams are asked of CUDA, by stand-ins for its streams and events; and what is left for decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from engine.geometry import MAX_SIDE
from engine.renderer.stage import LARGEST_TICK, TICK_WIDTHS
from engine.streams import CudaMark, CudaStreams, HostStreams, streams_of
from models.device_copies import upload
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine

GPU = torch.device("cuda:0")


class Stream:
    def __init__(self, device: torch.device, priority: int):
        assert device == GPU
        self.priority, self.waits = priority, list[Any]()

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)

    def wait_event(self, event: "Event") -> None:
        self.waits.append(event)


class Event:
    def __init__(self, enable_timing: bool, blocking: bool):
        assert enable_timing
        assert blocking, "a host that waits leaves its core to encoders"
        self.stream: Stream | None = None
        self.is_over, self.at_ms = False, 0.0

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, later: "Event") -> float:
        return later.at_ms - self.at_ms


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """Stand in for CUDA; return the streams that are current, innermost last."""
    current: list[Stream] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    for name, stand_in in (("Stream", Stream), ("Event", Event), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return current


def test_lanes_are_streams_and_passes_go_before_ticks_before_decoding(current: list[Stream]) -> None:
    streams = streams_of(GPU)
    assert streams.ticks_ahead == 1
    with streams.on("planner"), streams.on("renderer"), streams.on("decoder"):
        planner, renderer, decoder = current
    assert planner.priority < renderer.priority < decoder.priority
    assert not current


def test_a_lane_waits_for_its_leader_or_for_a_mark_and_the_host_for_neither(current: list[Stream]) -> None:
    streams = cast(CudaStreams, streams_of(GPU))
    lanes: dict[str, Any] = streams._streams
    streams.follow("decoder", "renderer")
    assert lanes["decoder"].waits == [lanes["renderer"]]
    mark = cast(CudaMark, streams.mark("decoder"))
    event: Any = mark.event
    assert event.stream is lanes["decoder"]
    streams.wait_for("renderer", mark)
    assert lanes["renderer"].waits == [event]
    assert not mark.is_reached
    mark.wait()
    assert mark.is_reached


def test_ticks_are_timed_by_events(current: list[Stream]) -> None:
    streams = streams_of(GPU)
    begun, ended = (cast(CudaMark, streams.mark("renderer")) for _ in range(2))
    cast(Any, begun.event).at_ms, cast(Any, ended.event).at_ms = 5.0, 155.0
    assert ended.seconds_since(begun) == pytest.approx(0.15)


def test_memory_is_kept_for_a_lane(current: list[Stream]) -> None:
    streams = cast(CudaStreams, streams_of(GPU))
    kept: list[Any] = []

    class Tensor:
        def record_stream(self, stream: Any) -> None:
            kept.append(stream)

    streams.keep(cast(Any, Tensor()), "decoder")
    streams.keep(None, "decoder")
    assert kept == [streams._streams["decoder"]]


def test_a_cpu_has_no_streams() -> None:
    assert isinstance(streams_of(torch.device("cpu")), HostStreams)
    tensor = torch.ones(3)
    assert upload(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("room", [10**6, 10**10])
def test_large_images_are_decoded_in_tiles_where_memory_is_short(
    model: GlmImage, room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Leave `room` bytes beside source images and the largest tick."""
    engine = small_engine(model, source_patches=1000)
    monkeypatch.setattr(model.autoencoder, "max_pixels", 0)
    config, itemsize = model.renderer.config, model.dtype.itemsize
    sources = 1000 * config.kv_bytes_per_token(itemsize)
    with caplog.at_level("INFO", logger="glimmer.engine"):
        engine.renderer.bound_decoding(sources + LARGEST_TICK * TICK_WIDTHS * config.dim * itemsize + room)
    assert model.autoencoder.max_pixels == room // model.autoencoder.bytes_per_pixel
    is_short = room < model.autoencoder.bytes_per_pixel * MAX_SIDE**2
    assert ("large_images_decoded_in_tiles" in caplog.text) == is_short == (room == 10**6)
