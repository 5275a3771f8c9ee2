"""Measure how long weights take from files to a device, and the memory of it.

    python -m benchmarks.loading                    1 GB in float32, loaded as float32 and as bfloat16
    python -m benchmarks.loading --gb 0.3 --device cuda

Writes a random checkpoint, then loads it in a process of its own, once after its pages were dropped from the system's
cache and once from there. A load ends when the weights have been read: on a CPU, weights of the files' dtype are maps
of the files. `peak` is the memory it took, over the bytes of the weights; `anonymous` is what it keeps beside such
maps, whose pages the system may drop.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.folders import cache_dir

DIM, BYTES_OF_LAYER = 1024, 53_000_000  # of a renderer, in float32


@dataclass(frozen=True)
class Loading:
    """Bytes, and seconds until all weights were read."""

    weights: int
    seconds: float
    peak: int
    anonymous: int


def write_checkpoint(folder: Path, size: int) -> Path:
    """Write a checkpoint whose renderer has about `size` bytes, unless it is there; return its folder."""
    from models.glm_image.random_weights import write_random_checkpoint

    if not (folder / "model_index.json").is_file():
        layers = max(1, size // BYTES_OF_LAYER)
        sizes = {"num_layers": layers, "num_attention_heads": DIM // 64, "attention_head_dim": 64}
        write_random_checkpoint(folder, renderer=sizes)
    return folder


def drop_pages(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_in_process(folder: Path, dtype: str, device: str) -> Loading:
    """Load in a new process, whose memory counts from when all libraries are there."""
    command = [sys.executable, "-m", "benchmarks.loading", "--load", str(folder), "--dtype", dtype, "--device", device]
    return Loading(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def load(folder: Path, dtype_name: str, device_name: str) -> Loading:
    """Load and read all weights; the process has loaded a small checkpoint before."""
    import torch

    from models.glm_image.model import GlmImage
    from models.glm_image.random_weights import cached_random_checkpoint

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    GlmImage.load(str(cached_random_checkpoint(cache_dir())), device, dtype).fingerprints()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, anonymous, began = _status("VmRSS"), _status("RssAnon"), time.perf_counter()
    model = GlmImage.load(str(folder), device, dtype)
    model.fingerprints()
    seconds = time.perf_counter() - began
    return Loading(model.weight_bytes, seconds, _status("VmHWM") - before, _status("RssAnon") - anonymous)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint; default: 1")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: both, one after the other")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(asdict(load(arguments.load, arguments.dtype, arguments.device))))
        return
    folder = write_checkpoint(cache_dir() / f"loading-{arguments.gb:g}", int(1e9 * arguments.gb))
    table = Table("as", "files", "weights GB", "seconds", "s/GB", "anonymous", "peak")
    for dtype in [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]:
        for state in ("from disk", "cached"):
            if state == "from disk":
                drop_pages(folder)
            done = load_in_process(folder, dtype, arguments.device)
            gigabytes = done.weights / 1e9
            figures = (gigabytes, done.seconds, done.seconds / gigabytes)
            shares = (done.anonymous / done.weights, done.peak / done.weights)
            table.add_row(dtype, state, *(f"{value:.2f}" for value in (*figures, *shares)))
    Console().print(table)


if __name__ == "__main__":
    main()
