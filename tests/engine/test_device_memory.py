"""Engines that share a device or a host."""

import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from engine import device_memory, limits
from engine.config import ENGINES_VARIABLE, EngineSettings
from engine.device_memory import device_lock, host_memory
from engine.limits import EngineLimits
from engine.planner.scheduler import PlannerScheduler
from engine.worker import process
from models.glm_image.config import PlannerConfig, RendererConfig
from models.glm_image.model import GlmImage
from server.processes.supervisor import engine_environments
from tests.checkpoints import small_engine

CUDA, GIB = torch.device("cuda"), 1 << 30
FREE = 80 * GIB
_FORKS = multiprocessing.get_context("fork")  # the children use torch for nothing but types


class Gpu:
    """A device whose free memory is a number in a file."""

    def __init__(self, folder: Path):
        self._file = folder / "free"

    def free(self, *_: object) -> tuple[int, int]:
        return int(self._file.read_text()), FREE

    def take(self, size: int) -> None:
        free = self.free()[0]
        time.sleep(0.2)  # loses what another process takes without the lock
        self._file.write_text(str(free - size))


def load_an_engine(folder: Path, results: Any) -> None:
    gpu = Gpu(folder)
    planner, renderer = SimpleNamespace(config=PlannerConfig()), SimpleNamespace(config=RendererConfig())
    model = SimpleNamespace(
        device=CUDA, dtype=torch.bfloat16, planner=planner, renderer=renderer, stage="all", weight_bytes=0
    )

    def engine(_: object, limits: EngineLimits) -> EngineLimits:
        gpu.take(limits.kv_tokens * planner.config.kv_bytes_per_token(2))
        return limits

    with (
        patch.object(process, "_device", lambda name: CUDA),
        patch.object(process.GlmImage, "load", lambda *_: model),
        patch.object(process, "check_memory"),
        patch.object(process, "Engine", engine),
        patch.object(process, "take_from_device", lambda device, size: gpu.take(size)),
        patch.object(torch.cuda, "mem_get_info", gpu.free),
        patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-test")),
        patch.object(device_memory.tempfile, "gettempdir", lambda: str(folder)),
    ):
        limits: Any = process._load(
            EngineSettings(redis_url="", model="m", device="cuda", max_images=1000, render_token_budget=4096)
        )
    taken = limits.kv_tokens * PlannerConfig().kv_bytes_per_token(2)
    results.put(taken + limits.source_patches * RendererConfig().kv_bytes_per_token(2))


def test_engines_that_start_together_on_one_device_share_its_memory(tmp_path: Path) -> None:
    (tmp_path / "free").write_text(str(FREE))
    results = _FORKS.Queue()
    engines = [_FORKS.Process(target=load_an_engine, args=(tmp_path, results)) for _ in range(2)]
    for engine in engines:
        engine.start()
    first, second = sorted((results.get(timeout=60) for _ in engines), reverse=True)
    for engine in engines:
        engine.join(60)
        assert engine.exitcode == 0
    assert first == pytest.approx(0.65 * FREE, rel=1e-3)
    assert second == pytest.approx(0.65 * 0.35 * FREE, rel=1e-3), "of what the first one left"
    assert Gpu(tmp_path).free()[0] == FREE - first - second


@pytest.fixture
def lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-test"))
    monkeypatch.setattr(device_memory.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "glimmer-GPU-test.lock"


def test_a_lock_that_is_never_released_delays_a_start_but_does_not_prevent_it(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "LOCK_TIMEOUT_S", 0.2)
    with device_lock(CUDA), device_lock(CUDA):
        pass
    assert lock_file.exists()


def test_a_folder_that_cannot_be_written_does_not_prevent_a_start(lock_file: Path) -> None:
    lock_file.symlink_to("/etc/passwd")  # another user's trap
    with device_lock(CUDA):
        pass


@pytest.mark.parametrize("trap", ["pipe", "folder", "of another user"])
def test_only_a_regular_file_of_this_user_is_locked(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    if trap == "pipe":
        os.mkfifo(lock_file)
    elif trap == "folder":
        lock_file.mkdir()
    else:
        lock_file.touch()
        monkeypatch.setattr(device_memory.os, "geteuid", lambda: lock_file.stat().st_uid + 1)
    monkeypatch.setattr(device_memory, "lock_for_a_time", lambda *_: pytest.fail("it was locked"))
    entered = threading.Event()

    def enter() -> None:
        with device_lock(CUDA):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(20)


def test_no_lock_is_taken_for_a_cpu(lock_file: Path) -> None:
    with device_lock(torch.device("cpu")):
        assert not lock_file.exists()


def test_all_blocks_that_are_promised_are_allocated_at_the_start(model: GlmImage) -> None:
    engine = small_engine(model)
    assert (
        engine.planner.runner.kv.pool.shape[1]
        == engine.limits.blocks + 1
        == engine.planner.scheduler.allocator.total + 1
    )
    assert isinstance(engine.planner.scheduler, PlannerScheduler)


@pytest.mark.parametrize(
    ("membership", "folder", "name"),
    [("0::/a/b", "a", "memory.max"), ("4:cpu,memory:/a/b\n0::/", "memory/a/b", "memory.limit_in_bytes")],
)
def test_the_host_s_memory_is_bounded_by_the_container_s(
    tmp_path: Path, membership: str, folder: str, name: str
) -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory(tmp_path) == host
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir(parents=True)
    groups.write_text(f"7:devices:/x\n{membership}\n")
    assert host_memory(tmp_path) == host
    file = tmp_path / "sys/fs/cgroup" / folder / name
    file.parent.mkdir(parents=True)
    for text, limit in [("max\n", host), ("1000000\n", 1_000_000)]:
        file.write_text(text)
        assert host_memory(tmp_path) == limit


@pytest.mark.parametrize("engines", [1, 2, 3, 4])
def test_engines_of_one_machine_share_its_memory(
    model: GlmImage, monkeypatch: pytest.MonkeyPatch, engines: int
) -> None:
    monkeypatch.setattr(limits, "host_memory", lambda: GIB)
    per_token = model.planner.config.kv_bytes_per_token(4), model.renderer.config.kv_bytes_per_token(4)
    taken = 0
    for environment in engine_environments({}, engines, "cpu"):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            chosen = EngineLimits.choose(model, max_images=1000)
        taken += chosen.kv_tokens * per_token[0] + chosen.source_patches * per_token[1]
    assert taken == pytest.approx(0.35 * GIB, rel=1e-3)


@pytest.mark.parametrize("value", ["", "0", "-1", "many"])
def test_a_share_that_is_no_number_is_ignored(model: GlmImage, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    alone = EngineLimits.choose(model)
    monkeypatch.setenv(ENGINES_VARIABLE, value)
    assert EngineLimits.choose(model) == alone


def test_caches_of_a_small_container_take_a_share_of_it(model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> None:
    large = EngineLimits.choose(model, max_images=1000)
    monkeypatch.setattr(limits, "host_memory", lambda: GIB)
    small = EngineLimits.choose(model, max_images=1000)
    per_token = model.planner.config.kv_bytes_per_token(4), model.renderer.config.kv_bytes_per_token(4)
    assert small.kv_tokens * per_token[0] + small.source_patches * per_token[1] == pytest.approx(0.35 * GIB, rel=1e-3)
    assert small.kv_tokens < large.kv_tokens
