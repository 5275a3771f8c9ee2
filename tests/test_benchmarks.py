"""The benchmarks run, and their arithmetic is that of the published sizes."""

import asyncio
import copy
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import admission, scaling
from benchmarks.full_size import Results, planner_bytes, run_full_size, run_parts
from benchmarks.full_size_check import compare_fused
from benchmarks.full_size_planner import Floor, run_planner
from benchmarks.full_size_renderer import Case, renderer_flop, run_both, run_renderer
from benchmarks.measure import Measurement, merge
from benchmarks.planning import in_turns, plan
from benchmarks.reference_planner import reference_planner
from benchmarks.rendering import counted_step
from benchmarks.streaming import measure as measure_streams
from benchmarks.streaming import run as run_streaming
from benchmarks.throughput import requests, run_small
from engine.jobs.job import JobSpec
from engine.renderer.runner import Network
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.cuda_attention import SequenceAttention
from models.glm_image.fused_renderer import FusedRenderer
from models.glm_image.kernels import render_reference
from models.glm_image.kernels.render_check import RenderKernels
from models.glm_image.model import GlmImage
from models.glm_image.paged_attention import PagedKV, PrefillAttention, PromptChunk, SequenceKV
from models.glm_image.planner import Planner, PlannerBatch, RotaryTable
from server.settings import ServerSettings
from tests.checkpoints import small_engine
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine


def test_the_small_run_prints_every_contestant(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(str(checkpoint), count=1, rounds=1, device=torch.device("cpu"))
    printed = capsys.readouterr().out
    for label in ("diffusers, one by one", "batched", "concurrency 1", "concurrency 4", "concurrency 16"):
        assert label in printed


def test_planning_with_look_ahead_takes_no_more_steps(model: GlmImage) -> None:
    engine = small_engine(replace(model, stage="plan"))
    greedy = JobSpec("x", 64, 64, seed=1, temperature=0.0, num_inference_steps=1)
    [without], [with_look_ahead] = in_turns(engine, 1, lambda: plan(engine, [greedy] * 2, 1))
    assert engine.is_idle
    assert without.tokens == with_look_ahead.tokens == 2 * greedy.image_plan_tokens
    assert with_look_ahead.steps <= without.steps
    assert without.steps >= without.tokens - 2, "the first token comes from the prompt"


@torch.inference_mode()
def test_the_planner_that_is_compared_with_is_the_same(model: GlmImage) -> None:
    tokens = torch.arange(40) * 7 % model.planner.config.vocab_size
    expected: Any = reference_planner(model).model.language_model
    positions = torch.arange(40).expand(3, 1, -1)
    state = expected(input_ids=tokens[None], position_ids=positions).last_hidden_state[0]
    kv = PagedKV(model.planner.config, 2, 32, model.dtype, model.device)
    attention = PrefillAttention(kv, [PromptChunk(SequenceKV(kv, [0, 1]), 0, 40)], torch.arange(40))
    rotary = RotaryTable(model.planner.config, 40, model.device).at(
        torch.arange(40)[:, None].expand(-1, 3), model.dtype
    )
    torch.testing.assert_close(model.planner(tokens, PlannerBatch(rotary, attention)), state, rtol=1e-4, atol=1e-4)


def test_requests_mix_all_sizes_and_steps() -> None:
    specs = requests(9)
    assert len({(spec.width, spec.height, spec.num_inference_steps) for spec in specs}) == 9


def test_rounds_add_up() -> None:
    both = merge([Measurement("a", 2.0, [1.0, 2.0], 3.0), Measurement("a", 4.0, [3.0], 5.0)])
    assert (both.seconds, both.images_per_second, both.p50, both.planner_ms_per_token) == (6.0, 0.5, 2.0, 4.0)


def test_floors_are_those_of_the_published_sizes() -> None:
    with torch.device("meta"):
        planner = Planner(PlannerConfig())
    assert planner_bytes(planner) == pytest.approx(16.45e9, rel=1e-3)
    assert renderer_flop(RendererConfig()) == pytest.approx(5.77e15, rel=0.02)


def test_full_size_requires_a_gpu() -> None:
    with pytest.raises(SystemExit, match="CUDA"):
        run_full_size(torch.device("cpu"))


def counted(results: Results, measured: list[str]) -> Callable[[str, Callable[[], Any]], Any]:
    """Return `results.measure`, which adds the names of what it measures."""
    return lambda name, work: results.measure(name, lambda: (measured.append(name), work())[1])


def test_the_parts_of_the_full_size_run_and_are_not_measured_twice(model: GlmImage, tmp_path: Path) -> None:
    """Run them on a small model, as far as they need no GPU."""
    file, console = tmp_path / "out" / "results.json", Console(width=120, record=True, file=io.StringIO())
    counts = []
    for _ in range(2):
        measured: list[str] = []
        measure = counted(Results(file, "a card"), measured)
        run_planner(model, Floor(10**9, 100, 1e12), measure, console, batches=(1, 2), side=64)
        run_renderer(model, 1e12, measure, console, [Case(64, 1), Case(64, 2)], steps=2)
        run_both(model, measure, console, side=64, steps=2, concurrency=(1, 2))
        counts.append(len(measured))
    assert counts == [2 + 1 + 2 + 1 + 1 + 4, 0]
    assert Results(file, "another card").measure("VAE 64", lambda: 0) == 0
    printed = console.export_text()
    assert printed.count("64x64, 2 at once") == 2
    run_parts(model, (), Results(file, "a card"), 1.0, 1.0, console)


def test_kernels_are_compared_with_the_renderer(model: GlmImage) -> None:
    console, renderer = Console(file=io.StringIO()), copy.deepcopy(model.renderer)

    def network(kernels: RenderKernels) -> Network:
        return FusedRenderer(renderer, kernels, SequenceAttention())

    compare_fused(renderer, network(RenderKernels()), model.device, console)

    def other_norm(*arguments: Any) -> Any:
        return 1.5 * render_reference.add_modulate(*arguments)

    with pytest.raises(SystemExit, match="away"):
        compare_fused(renderer, network(RenderKernels(add_modulate=other_norm)), model.device, console)


def test_engines_are_compared_by_those_that_render(tmp_path: Path) -> None:
    rates = [scaling.Rate("1 all", 1, 0.5), scaling.Rate("1 plan + 7 render", 7, 2.8)]
    with (tmp_path / "table").open("w+") as file:
        scaling.print_rates(rates, Console(file=file, width=100))
        file.seek(0)
        assert [word for word in file.read().split() if word in ("2.80", "0.80")] == ["2.80", "0.80"]


@pytest.mark.parametrize("hands_over", [False, True])
async def test_the_queue_s_own_cost_is_measured(tmp_path: Path, hands_over: bool) -> None:
    ceiling = await scaling.measure_queue(0.2, 1000, hands_over=hands_over, folder=tmp_path / "redis")
    assert ceiling.jobs_per_second > 0
    assert ceiling.redis_s > 0
    assert ceiling.bytes_in > 1000


async def test_streams_with_and_without_partial_images(queue: JobQueue, capsys: pytest.CaptureFixture[str]) -> None:
    server = LiveServer(queue, ServerSettings())  # type: ignore[call-arg]
    async with StubEngine(queue, step_s=0.01) as stub:
        partial, plain = await asyncio.to_thread(measure_streams, server.url, "96x64", 2, 3, itertools.count(1))
        await asyncio.to_thread(run_streaming, server.url, ["64x64"], [1, 2], 1)
    await server.stop()
    assert [spec.partial_images for spec in stub.specs[:12]] == [3, 3, 0, 0, 0, 0, 3, 3, 3, 3, 0, 0]
    assert len({spec.seed for spec in stub.specs[:12]}) == 12
    for first, final in zip(partial.first, partial.final, strict=True):
        assert first < final
    assert plain.first == plain.final
    assert (len(partial.final), len(plain.final)) == (6, 6)
    printed = capsys.readouterr().out
    assert printed.count("64x64") == 2
    assert "first partial" in printed


def test_admission_counts_accepted_and_refused_requests(capsys: pytest.CaptureFixture[str]) -> None:
    profile = admission.LoadProfile(connections=2, seconds=0.5, warm_up=0.0, rates=(None, 40.0), max_queue=5)
    closed, open_ = admission.run(profile)
    assert sum(len(load.latencies[admission.ACCEPTED]) for load in (closed, open_)) == 5
    assert closed.responses > 0
    assert open_.responses == 20
    assert min(open_.latencies[admission.REFUSED]) > 0
    printed = capsys.readouterr().out
    assert "closed loop" in printed
    assert "open loop, 40/s" in printed


@pytest.mark.parametrize("side", [128, 256])
def test_a_step_does_little_more_than_its_arithmetic(model: GlmImage, side: int) -> None:
    """Hold FLOP, bytes and operations of a guided image: nothing is computed again that steps share."""
    counter, tokens = counted_step(model, side, 1)
    config, sequence = model.renderer.config, tokens / 2
    products = 24 * config.dim**2 * tokens * config.num_layers
    attention = 2 * 4 * sequence**2 * config.dim * config.num_layers
    assert 1 <= counter.flop / (products + attention) <= 1.2  # rows of input and output, and 16 rows of padding
    scores = 2 * sequence**2 * config.num_attention_heads * config.num_layers
    assert counter.bytes <= 4 * (5 * scores + 80 * tokens * config.dim * config.num_layers)
    assert counter.operations <= 30 + 2 * config.num_layers * (25 + 4 * config.num_attention_heads)
