"""Replayed passes, run eagerly on the buffers that graphs would hold: the same plans, known a pass later."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.engine import Engine
from engine.planner import decoders
from engine.planner.buffers import SequenceBuffers
from engine.planner.decode_step import DecodeStep
from engine.planner.decoders import batch_sizes, cuda_decoder, graph_decoder
from engine.planner.graph_decoder import GraphDecoder
from engine.planner.scheduler import Sequence
from engine.request import Request
from models.glm_image.config import PlannerConfig, SamplingDefaults
from models.glm_image.fused_planner import FusedPlanner
from models.glm_image.kernels.check import DecodeKernels
from models.glm_image.model import GlmImage
from models.glm_image.paged_attention import PagedKV
from models.glm_image.planner import Planner, RotaryTable
from tests.checkpoints import small_engine
from tests.engine.test_lookahead import Plans, Share, at_random, engine_with, fixed, mixed_work, plans_of

WORK = mixed_work(6, seed=1)
MAX_LENGTH = 512


class EagerGraphs:
    """Runs what it captured again. A copy to the host is taken when it begins, and read later."""

    def __init__(self) -> None:
        self.replays, self.uploads = 0, 0

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def copy(self, tensor: Tensor) -> Callable[[], list[Any]]:
        copied = tensor.clone()
        return copied.tolist

    def upload(self, source: Tensor, target: Tensor) -> None:
        self.uploads += 1
        target.copy_(source)


def graph_engine(
    model: GlmImage, share: Share, batch_sizes: tuple[int, ...] = (16, 96), **limits: int
) -> tuple[Engine, EagerGraphs]:
    engine, graphs = engine_with(model, share, **limits), EagerGraphs()
    runner = engine.planner.runner
    decoder = graph_decoder(runner.step, runner.kv, DecodeKernels(), batch_sizes, MAX_LENGTH, graphs)
    with torch.inference_mode():
        decoder.capture()
    runner.decoder = decoder
    return engine, graphs


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "LENGTHS", (128,))


@pytest.fixture(scope="module")
def sequential(model: GlmImage) -> Plans:
    """Plan each request alone, token by token."""
    engine, _ = graph_engine(model, fixed(1))
    plans: Plans = {}
    for number, work in enumerate(WORK):
        plans |= plans_of(engine, [work], first=number)
    return plans


def test_sequential_plans_are_those_of_passes_that_the_host_follows(model: GlmImage, sequential: Plans) -> None:
    """Other sums round differently: greedy plans of random weights may differ after a tie, few of them do."""
    expected = plans_of(engine_with(model, fixed(1)), WORK)
    assert sequential.keys() == expected.keys()
    same = [sequential[key] == expected[key] for key in expected]
    assert sum(same) >= 0.8 * len(same)


@pytest.mark.parametrize("rows", [1, 7])
def test_plans_are_the_same_at_any_number_of_rows(model: GlmImage, sequential: Plans, rows: int) -> None:
    engine, _ = graph_engine(model, fixed(rows))
    assert plans_of(engine, WORK) == sequential


@pytest.mark.parametrize("seed", range(1))
def test_plans_are_the_same_in_any_order_beside_cancelled_ones(model: GlmImage, sequential: Plans, seed: int) -> None:
    rng = random.Random(seed)
    engine, _ = graph_engine(model, at_random(rng), max_images=10, kv_tokens=6000)
    plans = plans_of(engine, WORK, rng)
    assert plans == {key: tokens for key, tokens in sequential.items() if key in plans}
    assert {key for key in sequential if int(key[0]) % 5} <= set(plans)


def test_rows_are_uploaded_only_when_they_change(model: GlmImage) -> None:
    engine, graphs = graph_engine(model, fixed(1))
    plans_of(engine, WORK[1:4])
    assert graphs.replays > 50
    assert graphs.uploads <= 2 * len(WORK[1:4]) + 1


def test_a_plan_idles_for_one_pass(model: GlmImage) -> None:
    engine, graphs = graph_engine(model, fixed(1))
    [tokens] = plans_of(engine, WORK[1:2]).values()
    assert graphs.replays == len(tokens), "the prompt gives the first token, a further pass tells that all are written"


# --- what is used on a GPU


class NoGraphs(EagerGraphs):
    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        raise NotImplementedError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("failures", "graphs", "is_captured", "replaced"),
    [
        ({}, EagerGraphs, True, set()),
        ({"swiglu": "differs"}, EagerGraphs, True, {"swiglu"}),
        ({"nucleus": "differs"}, EagerGraphs, True, {"nucleus"}),
        ({"paged_decode": "does not compile"}, EagerGraphs, False, {"paged_decode"}),
        ({}, NoGraphs, False, {"cuda_graphs"}),
    ],
)
@torch.inference_mode()
def test_what_fails_is_replaced_and_named(
    model: GlmImage,
    failures: dict[str, str],
    graphs: type[EagerGraphs],
    is_captured: bool,
    replaced: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoders, "choose_kernels", lambda *_, **__: DecodeKernels(failures=failures))
    monkeypatch.setattr(decoders, "CudaGraphs", lambda device: graphs())
    runner = small_engine(model).planner.runner
    plain = runner.step.sample
    with caplog.at_level("INFO", logger="glimmer.engine"):
        decoder, reasons = cuda_decoder(runner.step, runner.kv, (16,), MAX_LENGTH)
    assert (decoder is not None) == is_captured
    assert set(reasons) == replaced
    assert all("\n" not in reason for reason in reasons.values())
    assert caplog.text.count("kernel_replaced") == len(replaced)
    assert ("planner_captured" in caplog.text) == is_captured
    assert (runner.step.sample is plain) == bool(replaced & {"nucleus", "paged_decode"})


# --- what the device does in a pass


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def launches() -> DecodeKernels:
    """Return stand-ins for kernels: a launch is an operation without arithmetic."""

    def rotate_and_write(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        groups, head_dim = cache.shape[-2:]
        return qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * groups, head_dim)

    return DecodeKernels(
        paged_decode=lambda *_: lambda layer, q, tables, row_sequence, lengths: torch.empty_like(q),
        rotate_and_write=rotate_and_write,
        rms_norm=lambda x, *_: torch.empty_like(x),
        add_rms_norm=lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
        swiglu=lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
        nucleus=lambda logits, *_: logits.new_empty(len(logits), dtype=torch.long),
    )


@torch.inference_mode()
def test_a_pass_reads_nothing_on_the_host_and_dispatches_the_same_whatever_its_size() -> None:
    """On tensors of the published planner without values: whatever reads one raises."""
    config, meta = PlannerConfig(), torch.device("meta")
    with meta:
        planner = Planner(config).to(torch.bfloat16)
    buffers, kv = SequenceBuffers(64, 5000, 200, 0, meta), PagedKV(config, 300, 32, torch.bfloat16, meta)
    step = DecodeStep(planner, buffers, RotaryTable(config, 8000, meta), SamplingDefaults(), 32)
    kernels = launches()
    step.sample = lambda logits, u, temperature, top_p: kernels.nucleus(logits, u, temperature, top_p, top_p)
    network = partial(FusedPlanner(planner, kv, buffers.blocks, kernels), kernels.paged_decode(kv.pool, 16, 9, 9))
    counts: list[int] = []
    for size in (1, 16, 128):
        lines, rows = torch.zeros(2, size, dtype=torch.long, device=meta)
        with Operations() as operations:
            step(lines, rows, network, None)
        counts.append(operations.count)
    assert abs(counts[0] - counts[1]) <= 1, counts
    assert counts[1] == counts[2] < 16 * config.num_hidden_layers, counts


class Recorded(EagerGraphs):
    """Replays nothing, as far as the host is concerned."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        return lambda: None


@torch.inference_mode()
def test_the_host_does_the_same_for_every_pass_whatever_its_size(model: GlmImage) -> None:
    engine = small_engine(model)
    runner, counts = engine.planner.runner, set[int]()
    decoder = GraphDecoder(runner.step, {5000: lambda tokens, *_: tokens}, (16, 64), Recorded())
    decoder.capture()
    requests = [Request(str(number), spec) for number, (spec, _) in enumerate(mixed_work(16, seed=2)) if spec.n == 1]
    for count in (1, 3, len(requests)):
        sequences = [Sequence(request.images[0], 5, line, [0]) for line, request in enumerate(requests[:count])]
        for sequence in sequences:
            decoder.add(sequence)
        decoder.decode(sequences)
        with Operations() as operations:
            decoder.decode(sequences)
        counts.add(operations.count)
    assert len(counts) == 1, counts
    assert counts.pop() < 10


@given(st.integers(1, 200), st.none() | st.integers(1, 300))
def test_batch_sizes_hold_all_sequences(sequences: int, smallest: int | None) -> None:
    sizes = batch_sizes(sequences, smallest)
    assert sequences <= sizes[-1] < 2 * sequences
    assert list(sizes) == [sizes[0] * 2**i for i in range(len(sizes))]
    assert len(sizes) == 1 if smallest is None or smallest >= sequences else min(smallest, sequences) <= sizes[0]
