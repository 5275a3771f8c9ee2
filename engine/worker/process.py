"""One engine process."""

import asyncio
import logging
import os
import sys
from contextlib import closing, suppress
from dataclasses import replace

import torch

from engine.config import EXIT_CONFIGURATION, EngineSettings
from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import EngineInfo
from engine.limits import EngineLimits
from engine.observability.logs import bind, configure, event, where
from engine.observability.tracing import Tracing, TracingError, open_tracing
from engine.worker.worker import HEARTBEAT_S, HEARTBEAT_TTL_S, Worker
from models.errors import CheckpointError
from models.glm_image.model import GlmImage
from models.nano import CHECKPOINT, NAME

logger = logging.getLogger("glimmer.engine")


class ConfigurationError(Exception):
    """A setting that this machine cannot provide."""


def main(settings: EngineSettings) -> int:
    """Run an engine until SIGTERM. Return the exit code: 0 after a drain, `EXIT_CONFIGURATION` if it cannot start."""
    configure(settings.log_level, settings.log_format)
    try:
        with closing(open_tracing("glimmer-engine")) as tracing:
            asyncio.run(_serve(settings, tracing))
    except (CheckpointError, ConfigurationError, TracingError) as error:
        print(f"glimmer engine: {error}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except Exception as error:
        event(logger, "engine_broke", logging.CRITICAL, error=repr(error), where=where(error))
        return 1
    return 0


async def _serve(settings: EngineSettings, tracing: Tracing) -> None:
    bind(engine=settings.engine_id)
    redis = connect(settings.redis_url)
    queue = JobConsumer(redis, lease_ms=round(settings.lease_s * 1000))
    starting = EngineInfo(
        settings.engine_id, os.getpid(), settings.stage, "starting", "", "", 0, settings.max_prompt_tokens
    )
    try:
        loading = asyncio.ensure_future(asyncio.to_thread(_load, settings))
        while not loading.done():
            with suppress(QueueUnavailable):
                await queue.heartbeat(starting, "", HEARTBEAT_TTL_S)
            await asyncio.wait({loading}, timeout=HEARTBEAT_S)
        engine = loading.result()
        info = _ready(starting, engine.model, settings.model)
        event(
            logger,
            "engine_ready",
            model=info.model,
            device=engine.model.device,
            dtype=engine.model.dtype,
        )
        await Worker(engine, queue, info, settings, tracing).run()
    finally:
        await queue.close()
        await redis.aclose()


def _load(settings: EngineSettings) -> Engine:
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    model = GlmImage.load(settings.model or str(CHECKPOINT), device, dtype)
    limits = EngineLimits.choose(
        model,
        max_images=settings.max_images,
        max_prompt_tokens=settings.max_prompt_tokens,
        kv_tokens=settings.kv_tokens,
        render_token_budget=settings.render_token_budget,
    )
    return Engine(model, limits)


def _ready(starting: EngineInfo, model: GlmImage, configured: str | None) -> EngineInfo:
    """Return the heartbeats' content for a loaded model."""
    side = model.autoencoder.default_side
    return replace(
        starting,
        state="ready",
        model=configured or NAME,
        default_size=model.defaults.size or f"{side}x{side}",
        codebook_size=model.planner.config.codebook_size,
        default_steps=model.defaults.num_inference_steps,
        default_guidance=model.defaults.guidance_scale,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r}: torch finds no CUDA device on this machine")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise ConfigurationError(f"dtype {name!r}: expected auto, float32 or bfloat16") from None
