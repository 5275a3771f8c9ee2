"""An engine process with a model that sleeps instead of computing.

Everything but the networks is what `glimmer engine` runs: process, worker, queue, stages, schedulers, block allocator,
encoder. Plans and images are pure functions of the request and its source images, so that a client knows the bytes
beforehand.

A prompt that begins with `POISON` crashes the process in its third denoising step, one that begins with `OOM` takes
memory there until the kernel kills the process, and one that begins with `HANG` never finishes that step. The image of
one that begins with `NOISE` cannot be compressed.
"""

import ctypes
import hashlib
import io
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor, nn

from engine.config import EngineSettings
from engine.engine import Engine
from engine.geometry import CELL, Geometry
from engine.jobs.job import JobSpec, SourceImages, Stage, TokenGrid
from engine.limits import EngineLimits
from engine.planner.passes import Pass
from engine.planner.scheduler import PromptGroup
from engine.planner.scheduler import Sequence as PlanSequence
from engine.renderer.rendering import Rendering
from engine.renderer.runner import PREVIEW_STEPS
from engine.renderer.timesteps import partial_steps
from engine.request import Image, Request
from engine.stages import NoRenderer
from engine.stop_signals import StopSignals
from engine.streams import Streams
from engine.worker import process
from engine.worker.encoding import encode, metadata
from models.glm_image.config import RequestDefaults
from models.glm_image.model import GlmImage
from models.glm_image.source_images import EncodedImage, PreprocessedImage
from tests.chaos.journal import Journal, WitnessedConsumer

POISON, HANG, OOM, NOISE = "POISON", "HANG", "OOM", "NOISE"
FATAL_STEP = 3
CODEBOOK_SIZE, IMAGE_TOKEN = 256, -1
TILE = 8  # pixels; side of one colour
HOARD_BYTES, HOARD = 2**24, 96  # 1.5 GiB at most, should there be no limit


@dataclass(frozen=True)
class StubSettings:
    """Speed and limits of the stub.

    Args:
        planner_step_s, renderer_tick_s: duration of one step of a batch.
        max_images: images in flight.
        images_per_tick: 64x64 images that fit a renderer tick.
        oom_counter: a file in which `OOM` counts its death instead of taking memory.
    """

    planner_step_s: float = 0.001
    renderer_tick_s: float = 0.012
    max_images: int = 8
    images_per_tick: int = 6
    oom_counter: Path | None = None


# --- plans and images -------------------------------------------------------------------------------------------------


def plan_tokens(spec: JobSpec, seed: int) -> list[int]:
    """Return what the planner writes for an image: the preview, if any, then the plan."""
    known = f"{spec.prompt}|{spec.width}x{spec.height}|{seed}".encode()
    return list(hashlib.shake_256(known).digest(spec.image_plan_tokens))


def pixels(spec: JobSpec, seed: int, tokens: Sequence[int], sources: SourceImages | None, stage: str = "") -> Tensor:
    """Return coloured tiles [height, width, 3], uint8."""
    known = hashlib.sha256(f"{spec.prompt}|{seed}|{stage}".encode() + bytes(tokens))
    for file in sources.files if sources else ():
        known.update(file)
    tile = 1 if spec.prompt.startswith(NOISE) else TILE
    rows, cols = math.ceil(spec.height / tile), math.ceil(spec.width / tile)
    colours = np.frombuffer(hashlib.shake_256(known.digest()).digest(rows * cols * 3), np.uint8).reshape(rows, cols, 3)
    tiled = colours.repeat(tile, 0).repeat(tile, 1)[: spec.height, : spec.width]
    return torch.from_numpy(np.ascontiguousarray(tiled))


def files(spec: JobSpec, sources: SourceImages | None) -> list[bytes]:
    """Return the encoded images that an undisturbed engine commits for a job."""
    plan = spec.grids[-1].tokens
    encoded = []
    for seed in range(spec.seed, spec.seed + spec.n):
        image = pixels(spec, seed, plan_tokens(spec, seed)[-plan:], sources)
        encoded.append(encode(image, spec.output_format, spec.output_compression, metadata(spec, seed)))
    return encoded


# --- stand-ins for the networks ---------------------------------------------------------------------------------------


class SleepingPlanner:
    """Stands in for `PlannerRunner`."""

    def __init__(self, model: nn.Module, *_: object, **__: object):
        self._step_s = cast(StubPlannerNetwork, model).step_s
        self._passes: list[Pass] = []
        self.fallbacks: dict[str, str] = {}

    def measure_passes(self) -> dict[int, float]:
        return {}

    def prefill(self, groups: list[PromptGroup]) -> None:
        time.sleep(self._step_s)

    def decode(self, sequences: list[PlanSequence]) -> None:
        time.sleep(self._step_s)
        self._passes += [Pass(sequence, 1, sequence.written + 1) for sequence in sequences]

    def take_passes(self) -> list[Pass]:
        passes, self._passes = self._passes, []
        return passes

    def read(self, sequence: PlanSequence) -> list[int]:
        """Return the tokens written so far, so that a plan that is read too early is too short."""
        return plan_tokens(sequence.request.spec, sequence.image.seed)[: sequence.written]


class SleepingRenderer:
    """Stands in for `RendererRunner`."""

    fallbacks = ()

    def __init__(self, model: "StubModel", streams: Streams):
        self._tick_s, self._journal = model.settings.renderer_tick_s, model.journal
        self._oom_counter = model.settings.oom_counter
        self.source_kv: dict[Request, None] = {}

    def encode_glyphs(self, request: Request) -> Iterator[int]:
        return iter(())

    def read_sources(self, request: Request) -> Iterator[bool]:
        return iter(())

    def prepare(self, image: Image) -> Rendering:
        spec, plan = image.request.spec, image.plan
        assert plan is not None
        if image.request.encoded:
            self.source_kv[image.request] = None
        partial_after = partial_steps(spec.num_inference_steps, spec.partial_images - (image.preview is not None))
        grid = TokenGrid(plan.rows, plan.cols, plan.tokens)
        return _rendering(image, grid, spec.num_inference_steps, partial_after, is_preview=False)

    def prepare_preview(self, image: Image) -> Rendering:
        assert image.preview is not None
        return _rendering(image, image.preview, PREVIEW_STEPS, [PREVIEW_STEPS], is_preview=True)

    def advance(self, renderings: list[Rendering]) -> None:
        for rendering in renderings:
            if rendering.step + 1 == FATAL_STEP and not rendering.is_preview:
                self._fail_on_purpose(rendering.request.spec.prompt)
        time.sleep(self._tick_s)
        for rendering in renderings:
            rendering.step += 1

    def warm_up(self) -> None: ...

    def decode(self, rendering: Rendering) -> Callable[[], Tensor]:
        request, stage = rendering.request, "" if not rendering.steps_left else f"step {rendering.step}"
        drawn = pixels(request.spec, rendering.image.seed, rendering.grid.tokens, request.source_images, stage)
        return lambda: drawn

    def release(self, request: Request) -> None:
        self.source_kv.pop(request, None)
        job_id, epoch = request.id.rsplit("/", 1)
        self._journal.write("freed", job_id, int(epoch))

    def padding(self, tokens: int) -> int:
        return 0

    def _fail_on_purpose(self, prompt: str) -> None:
        if prompt.startswith(POISON):
            os.kill(os.getpid(), signal.SIGSEGV)
        if prompt.startswith(OOM):
            _run_out_of_memory(self._oom_counter)
        if prompt.startswith(HANG):
            self._journal.write("hangs")
            time.sleep(3600)


def _run_out_of_memory(counter: Path | None) -> None:
    if counter is not None:
        counter.write_text(f"oom_kill {int(counter.read_text().split()[1]) + 1}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    hoard: list[bytes] = []
    while len(hoard) < HOARD:
        hoard.append(b"\1" * HOARD_BYTES)


def _rendering(image: Image, grid: TokenGrid, steps: int, partial_after: list[int], *, is_preview: bool) -> Rendering:
    """Return a rendering whose tensors have lengths but no contents."""
    geometry = image.request.spec.geometry
    patches, nothing = torch.empty(geometry.patches.tokens, 0), torch.empty(0)
    return Rendering(
        image,
        geometry,
        grid,
        is_preview,
        partial_after,
        latents=patches,
        plan=nothing,
        glyphs=torch.empty(1, 0),
        negative_glyphs=torch.empty(1, 0),
        time_embeddings=torch.empty(steps, 0),
        sigmas=nothing,
        distances=nothing,
        angles=nothing,
        source_kv=None,
    )


class StubPlannerNetwork(nn.Module):
    """A planner without weights: what the worker and the engine read of one."""

    def __init__(self, step_s: float):
        super().__init__()
        self.step_s = step_s
        self.config = SimpleNamespace(codebook_size=CODEBOOK_SIZE)


class StubPrompts:
    """One token per byte."""

    image_token = IMAGE_TOKEN

    def count(self, text: str) -> int:
        return len(text.encode())

    def encode(self, prompt: str, height: int, width: int, num_sources: int = 0) -> list[int]:
        return [IMAGE_TOKEN] * num_sources + list(prompt.encode())


class StubPreprocessor:
    """Reads the grid of a source image, and none of its contents."""

    def read(self, file: bytes) -> PreprocessedImage:
        width, height = PillowImage.open(io.BytesIO(file)).size
        return PreprocessedImage(math.ceil(height / CELL), math.ceil(width / CELL), torch.empty(0), torch.empty(0))


@dataclass
class StubModel:
    """Stands in for `GlmImage`."""

    settings: StubSettings
    journal: Journal
    prompts: StubPrompts = field(default_factory=StubPrompts)
    preprocessor: StubPreprocessor = field(default_factory=StubPreprocessor)
    defaults: RequestDefaults = field(default_factory=lambda: RequestDefaults(size="64x64", num_inference_steps=10))
    autoencoder: Any = field(default_factory=lambda: SimpleNamespace(default_side=64, encode=lambda _: torch.empty(0)))
    sampling: None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    stage: Stage = "all"

    def __post_init__(self) -> None:
        self.planner = StubPlannerNetwork(self.settings.planner_step_s)
        self.renderer = SimpleNamespace(config=SimpleNamespace(prior_vq_quantizer_codebook_size=CODEBOOK_SIZE))

    def planning_fingerprint(self) -> str:
        return "stub"

    def fingerprints(self) -> tuple[str, str, str]:
        return "stub", "stub", "stub"

    def on_progress(self, beat: Callable[[], object]) -> None:
        """Do nothing: a step of the stub is short."""

    def encode_source(self, image: PreprocessedImage) -> EncodedImage:
        return EncodedImage(torch.zeros(image.rows, image.cols, dtype=torch.long), torch.empty(0))


# --- the process ------------------------------------------------------------------------------------------------------


def run_engine(settings: EngineSettings, stub: StubSettings, folder: Path) -> None:
    """Run one engine process to its exit; its stderr and journal are in `folder`, named by the engine's id."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open(folder / f"{settings.engine_id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    journal = Journal(folder / f"{settings.engine_id}.jsonl")
    engines: list[Engine] = []

    def load(settings: EngineSettings) -> Engine:
        engines.append(_engine(stub, journal, settings.stage))
        return engines[0]

    WitnessedConsumer.journal = journal
    with patch.multiple(process, _load=load, JobConsumer=WitnessedConsumer):
        code = process.main(settings, StopSignals().install())
    if code == 0 and engines:
        journal.write("integrity", _integrity(engines[0]))
    sys.exit(code)


def die_with_parent() -> None:
    """End with the fork server, which ends with the campaign."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _engine(stub: StubSettings, journal: Journal, stage: Stage) -> Engine:
    image = Geometry(64, 64)
    limits = EngineLimits(
        max_images=stub.max_images,
        max_prompt_tokens=2048,
        kv_tokens=32 * math.ceil(stub.max_images * (image.plan_tokens + 512) / 32),
        render_token_budget=stub.images_per_tick * 2 * (image.patches.tokens + 1),
        source_patches=64 * stub.max_images,
    )
    model = cast(GlmImage, StubModel(stub, journal, stage=stage))
    with (
        patch.multiple("engine.planner.stage", PlannerRunner=SleepingPlanner, PagedKV=_nothing),
        patch.multiple("engine.renderer.stage", RendererRunner=SleepingRenderer),
    ):
        engine = Engine(model, limits)
    if isinstance(engine._renderer, NoRenderer):
        _record_aborts(engine._renderer, journal)
    return engine


def _record_aborts(renderer: NoRenderer, journal: Journal) -> None:
    """Tell when a planner drops a job; a renderer's runner does so itself."""
    abort = renderer.abort

    def recorded(request: Request) -> None:
        job_id, epoch = request.id.rsplit("/", 1)
        journal.write("freed", job_id, int(epoch))
        abort(request)

    renderer.abort = recorded


def _nothing(*_: object) -> None:
    """Stand in for the key/value cache."""


def _integrity(engine: Engine) -> str:
    """Return what a drained engine still holds; empty if nothing."""
    engine.step()  # what was cancelled at the very end
    try:
        assert engine.is_idle, "requests are left"
        engine.check_integrity()
    except AssertionError as error:
        return str(error) or "blocks, buffers or renderings are left"
    return ""
