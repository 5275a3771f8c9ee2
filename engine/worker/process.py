import asyncio
import logging
import os
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace

import torch

from engine.config import EXIT_CONFIGURATION, EngineSettings
from engine.device_memory import device_lock, take_from_device
from engine.engine import Engine
from engine.errors import QueueUnavailable, StartError
from engine.jobs.connection import connect
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import EngineInfo
from engine.jobs.result_store import open_result_store
from engine.limits import EngineLimits
from engine.memory_estimate import check_memory
from engine.observability.logs import bind, configure, event, where
from engine.observability.tracing import Tracing, open_tracing
from engine.renderer.calibration import cache_folder
from engine.stop_signals import Stopped, StopSignals, run
from engine.tasks import stop as end_task
from engine.worker.status import EngineStatus
from engine.worker.worker import HEARTBEAT_S, HEARTBEAT_TTL_S, Worker
from models.errors import CheckpointError
from models.glm_image.model import GlmImage
from models.nano import CHECKPOINT, NAME

CLOSE_S = 2.0  # for the last calls to Redis

logger = logging.getLogger("glimmer.engine")


def main(settings: EngineSettings, stop: StopSignals) -> int:
    """Run an engine until a signal. Return the exit code: 0, or `EXIT_CONFIGURATION` if it cannot start."""
    configure(settings.log_level, settings.log_format)
    try:
        with closing(open_tracing("glimmer-engine")) as tracing:
            run(_serve(settings, tracing, stop))
    except Stopped:
        return 0
    except (CheckpointError, StartError) as error:
        print(f"glimmer engine: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except Exception as error:
        event(logger, "engine_broke", logging.CRITICAL, error=repr(error), where=where(error))
        return 1
    return 0


async def _serve(settings: EngineSettings, tracing: Tracing, stop: StopSignals) -> None:
    stop.attach()
    bind(engine=settings.engine_id)
    redis = connect(settings.redis_url)
    store = open_result_store(settings.result_store)
    queue = JobConsumer(redis, stage=settings.stage, result_store=store, lease_ms=round(settings.lease_s * 1000))
    starting = EngineInfo(
        settings.engine_id, os.getpid(), settings.stage, "starting", "", "", 0, settings.max_prompt_tokens
    )
    status = EngineStatus(settings.engine_id)
    tasks = [asyncio.create_task(status.keep())]
    try:
        loading = asyncio.create_task(_announce(queue, starting))
        try:
            if store is not None and settings.stage != "plan":
                await stop.unless_stopped(store.check())
            loaded = await stop.unless_stopped(asyncio.to_thread(_load_or_explain, settings, starting))
        finally:
            await asyncio.wait({asyncio.ensure_future(end_task(loading))}, timeout=CLOSE_S)
        engine, info, planner = loaded
        event(
            logger,
            "engine_ready",
            stage=info.stage,
            model=info.model,
            device=engine.model.device,
            dtype=engine.model.dtype,
        )
        worker = Worker(engine, queue, info, settings, tracing, planner=planner)
        status.state = lambda: worker.state
        tasks.append(asyncio.create_task(_follow(stop, worker)))
        await worker.run()
    finally:
        for task in tasks:
            task.cancel()
        status.remove()
        await asyncio.wait({asyncio.ensure_future(_close(queue, settings.engine_id))}, timeout=CLOSE_S)


async def _announce(queue: JobConsumer, starting: EngineInfo) -> None:
    while True:
        with suppress(QueueUnavailable):
            await queue.heartbeat(starting, "", HEARTBEAT_TTL_S)
        await asyncio.sleep(HEARTBEAT_S)


async def _follow(stop: StopSignals, worker: Worker) -> None:
    """Drain at the first signal, hand jobs back at the second."""
    await stop.draining.wait()
    worker.drain()
    await stop.hurried.wait()
    worker.drain()


async def _close(queue: JobConsumer, engine_id: str) -> None:
    with suppress(QueueUnavailable):
        await queue.deregister(engine_id)
    await queue.close()
    await queue.client.aclose()


def _load_or_explain(settings: EngineSettings, starting: EngineInfo) -> tuple[Engine, EngineInfo, str]:
    """Return the engine, its heartbeats' content and the planner's fingerprint."""
    try:
        engine = _load(settings)
        return engine, _ready(starting, engine.model, settings.model), engine.model.planning_fingerprint()
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError) as error:
        # Of files and libraries; a device raises RuntimeError.
        raise StartError(f"the checkpoint cannot be loaded: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library has no class for its errors.
        raise StartError(f"the checkpoint's tokenizer cannot be loaded: {error}") from error


def _load(settings: EngineSettings) -> Engine:
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    name, began = settings.model or str(CHECKPOINT), time.monotonic()
    check_memory(settings, name, device, dtype)
    model = GlmImage.load(name, device, dtype, settings.stage)
    seconds, gigabytes = time.monotonic() - began, model.weight_bytes / 1e9
    event(
        logger,
        "checkpoint_loaded",
        seconds=seconds,
        gb=f"{gigabytes:.2f}",
        gb_per_s=f"{gigabytes / max(seconds, 1e-3):.2f}",
    )
    with device_lock(device):
        limits = EngineLimits.choose(
            model,
            max_images=settings.max_images,
            max_prompt_tokens=settings.max_prompt_tokens,
            kv_tokens=settings.kv_tokens,
            render_token_budget=settings.render_token_budget,
            min_planner_rows=settings.min_planner_rows,
        )
        engine = Engine(model, limits)
        if settings.stage != "plan" and settings.render_token_budget is None:
            engine.renderer.calibrate(cache_folder())
        if settings.stage != "plan":
            patch_bytes = model.renderer.config.kv_bytes_per_token(model.dtype.itemsize)
            take_from_device(device, limits.source_patches * patch_bytes)
    return engine


def _ready(starting: EngineInfo, model: GlmImage, configured: str | None) -> EngineInfo:
    """Return the heartbeats' content for a loaded model."""
    side = model.autoencoder.default_side
    whole, planner, renderer = model.fingerprints()
    return replace(
        starting,
        state="ready",
        model=configured or NAME,
        default_size=model.defaults.size or f"{side}x{side}",
        codebook_size=model.planner.config.codebook_size,
        default_steps=model.defaults.num_inference_steps,
        default_guidance=model.defaults.guidance_scale,
        max_text_characters=model.defaults.max_text_characters,
        fingerprint=whole,
        planner=planner,
        renderer=renderer,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartError(f"device {name!r}: torch finds no CUDA device on this machine")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise StartError(f"dtype {name!r}: expected auto, float32 or bfloat16") from None
