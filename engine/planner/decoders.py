"""Choose what runs planner passes on a GPU."""

import logging
import time
from functools import partial

import torch
from torch import Tensor

from engine.device_errors import is_lost_device
from engine.observability.fallbacks import log_fallbacks
from engine.observability.logs import event
from engine.planner.cuda_graphs import CudaGraphs
from engine.planner.decode_step import DecodeStep, Sample
from engine.planner.graph_decoder import GraphDecoder, Graphs
from models.glm_image.fused_planner import FusedPlanner
from models.glm_image.kernels.check import DecodeKernels, choose_kernels
from models.glm_image.kernels.launch import next_power_of_2
from models.glm_image.paged_attention import PagedKV

LENGTHS = (2048, 8192)  # of a prompt and its plan: the attention of a pass has a grid for the longest
GRAPHS = "cuda_graphs"  # among the kernels, in logs and metrics

logger = logging.getLogger("glimmer.engine")


def batch_sizes(max_sequences: int, smallest: int | None) -> tuple[int, ...]:
    """Return powers of two from `smallest`; None: only the one that holds all sequences, for the same bits always."""
    largest = next_power_of_2(max_sequences)
    size = min(largest, next_power_of_2(smallest or largest))
    sizes: list[int] = []
    while size <= largest:
        sizes.append(size)
        size *= 2
    return tuple(sizes)


def graph_decoder(
    step: DecodeStep, kv: PagedKV, kernels: DecodeKernels, sizes: tuple[int, ...], max_length: int, graphs: Graphs
) -> GraphDecoder:
    """Return a decoder, not yet captured, for sequences of up to `max_length` tokens."""
    fused = FusedPlanner(step.model, kv, step.buffers.blocks, kernels)
    bounds = [length for length in LENGTHS if length < max_length] + [max_length]
    networks = {n: partial(fused, kernels.paged_decode(kv.pool, kv.group, n, sizes[-1])) for n in bounds}
    return GraphDecoder(step, networks, sizes, graphs)


def cuda_decoder(
    step: DecodeStep, kv: PagedKV, sizes: tuple[int, ...], max_length: int
) -> tuple[GraphDecoder | None, dict[str, str]]:
    """Return the captured decoder, and why parts of it do without their kernel; None: it cannot be captured.

    Without the attention's kernel there is none: attention by torch takes a copy of every row's cache.
    """
    device, config = step.buffers.device, step.model.config
    kernels = choose_kernels(config, kv.pool.dtype, device, block_size=kv.block_size, max_length=max_length)
    failures = dict(kernels.failures)
    decoder = None
    if "paged_decode" not in failures:
        if "nucleus" not in failures:
            step.sample = _sample_by(kernels, step.sampling.top_k, sizes[-1], device)
        try:
            decoder = graph_decoder(step, kv, kernels, sizes, max_length, CudaGraphs(device))
            started = time.monotonic()
            decoder.capture()
            event(logger, "planner_captured", batch_sizes=",".join(map(str, sizes)), seconds=time.monotonic() - started)
        except Exception as error:  # of torch, Triton or the driver
            if is_lost_device(error):
                raise
            decoder, failures[GRAPHS] = None, str(error).splitlines()[0]
    log_fallbacks(failures)
    return decoder, failures


def _sample_by(kernels: DecodeKernels, top_k: int | None, max_rows: int, device: torch.device) -> Sample:
    counts = torch.full((max_rows,), top_k or 0, dtype=torch.int32, device=device)

    def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
        return kernels.nucleus(logits, uniform, temperature, top_p, counts[: len(logits)])

    return sample
