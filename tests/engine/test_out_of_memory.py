"""Out of device memory: a batch is split, a request fails with a reason."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.batch_limit import RECOVERY_BATCHES, BatchLimit
from engine.device_errors import is_lost_device, is_out_of_memory
from engine.engine import Engine
from engine.errors import RequestError, WriteRefused
from engine.jobs.job import JobSpec
from engine.request import Event, Failed, Rendered, Request
from engine.worker.encoding import encode
from engine.worker.job_errors import to_job_error
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine

SPECS = [JobSpec(f"{i} 'w'", 64, 64, seed=10 * i, num_inference_steps=6, n=1 + i % 2) for i in range(4)]
TOO_LITTLE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run(engine: Engine, specs: list[JobSpec]) -> list[Event]:
    for number, spec in enumerate(specs):
        engine.submit(Request(str(number), spec))
    events: list[Event] = []
    while not engine.is_idle:
        events += engine.step()
    engine.check_integrity()
    return events


def pngs(events: list[Event]) -> dict[tuple[str, int], bytes]:
    return {
        (event.request.id, event.image.index): encode(event.pixels, "png", 100)
        for event in events
        if isinstance(event, Rendered)
    }


def counted(engine: Engine, whose: str) -> float:
    return engine.metrics.out_of_memory.labels(whose)._value.get()


@pytest.fixture(scope="module")
def undisturbed(model: GlmImage) -> dict[tuple[str, int], bytes]:
    return pngs(run(small_engine(model), SPECS))


def plant(monkeypatch: pytest.MonkeyPatch, target: object, name: str, fails: Callable[[list[Any]], bool]) -> list[int]:
    """Make a step run out of memory. Return the sizes of all batches, negative for those that failed."""
    real, sizes = getattr(target, name), list[int]()

    def step(items: list[Any]) -> None:
        fits = not fails(items)
        sizes.append(len(items) if fits else -len(items))
        if not fits:
            raise TOO_LITTLE
        real(items)

    monkeypatch.setattr(target, name, step)
    return sizes


@pytest.mark.parametrize(
    ("stage", "largest", "limit"),
    [
        ("prefill", 1, lambda engine: engine.planner.scheduler.prefill_limit),
        ("decode", 2, lambda engine: engine.planner.scheduler.decode_limit),
        ("advance", 2, lambda engine: engine.renderer.scheduler.token_limit),
    ],
)
def test_a_batch_that_is_too_large_is_split_and_later_ones_are_smaller(
    model: GlmImage,
    undisturbed: dict[tuple[str, int], bytes],
    stage: str,
    largest: int,
    limit: Callable[[Engine], BatchLimit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = small_engine(model)
    emptied: list[int] = []
    target = engine.renderer.runner if stage == "advance" else engine.planner.runner
    sizes = plant(monkeypatch, target, stage, lambda items: len(items) > largest)
    monkeypatch.setattr(engine.boundary, "empty_cache", lambda: emptied.append(len(sizes)))
    events = run(engine, SPECS)
    assert pngs(events) == undisturbed
    assert not any(isinstance(event, Failed) for event in events)
    failures = [at for at, size in enumerate(sizes) if size < 0]
    assert 1 <= len(failures) <= 4, "a few halvings find the limit"
    assert emptied == [at + 1 for at in failures], "before each request is tried alone"
    assert limit(engine).current < limit(engine).maximum
    assert (counted(engine, "batch"), counted(engine, "request")) == (len(failures), 0)


@pytest.mark.parametrize("stage", ["prefill", "decode", "advance"])
def test_a_request_that_is_too_large_fails_alone(
    model: GlmImage, undisturbed: dict[tuple[str, int], bytes], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the limits, because the other batches were not too large."""
    engine = small_engine(model)
    target = engine.renderer.runner if stage == "advance" else engine.planner.runner
    plant(monkeypatch, target, stage, lambda items: any(item.request.id == "2" for item in items))
    events = run(engine, SPECS)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request.id, failed.error) == ("2", TOO_LITTLE)
    assert pngs(events) == {key: data for key, data in undisturbed.items() if key[0] != "2"}
    assert counted(engine, "request") == 1
    for limit in (
        engine.renderer.scheduler.token_limit,
        engine.planner.scheduler.decode_limit,
        engine.planner.scheduler.prefill_limit,
    ):
        assert limit.current == limit.maximum


def test_a_failed_event_keeps_no_tensors(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, held = small_engine(model), list[weakref.ref[torch.Tensor]]()

    def advance(_: object) -> None:
        large = torch.zeros(9)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(engine.renderer.runner, "advance", advance)
    events = run(engine, SPECS[:1])
    assert any(isinstance(event, Failed) for event in events)
    assert [reference() for reference in held] == [None]


def test_a_batch_limit_is_halved_and_recovers() -> None:
    limit = BatchLimit(100)
    limit.ran_out(40)
    assert limit.take() == 20
    limit.ran_out(90)
    assert limit.take() == 10, "never raised by a failure"
    taken = [limit.take() for _ in range(5 * RECOVERY_BATCHES)]
    assert sorted(set(taken)) == [10, 20, 40, 80, 100]
    assert taken == sorted(taken)
    for _ in range(10):
        limit.ran_out(1)
    assert limit.take() == 1, "one item always goes"


LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("HIP error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
]
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]
NEITHER = [RuntimeError("shape mismatch"), ValueError("CUDA error: says a prompt"), RequestError("no")]


def test_exceptions_are_classified() -> None:
    assert [(is_lost_device(error), is_out_of_memory(error)) for error in (*LOST, *NO_MEMORY, *NEITHER)] == [
        *[(True, False)] * len(LOST),
        *[(False, True)] * len(NO_MEMORY),
        *[(False, False)] * len(NEITHER),
    ]


def test_an_out_of_memory_error_says_what_would_help() -> None:
    spec = JobSpec("secret", 2048, 1024, seed=1)
    one, many = to_job_error(TOO_LITTLE, spec), to_job_error(TOO_LITTLE, replace(spec, n=3, num_sources=2))
    assert (one.code, one.type) == ("out_of_memory", "server_error")
    assert one.message == (
        "The engine's device has not enough memory for an image of 2048x1024. Ask for a smaller size."
    )
    assert many.message.endswith(
        "3 images of 2048x1024. Ask for a smaller size or fewer images (n) or an edit of fewer or smaller images."
    )
    refused = to_job_error(WriteRefused("x"), spec)
    assert refused.code == "result_too_large"
    assert "jpeg" in refused.message
    assert to_job_error(ValueError("secret"), spec).message == "The engine failed on this request."
