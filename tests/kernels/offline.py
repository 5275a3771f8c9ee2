"""Compile kernels for cards that are not at hand, just as their callers launch them.

    make cuda-check

prints registers, bytes in local memory (spilled registers and stack) and shared memory of every kernel.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CARDS = {80: "A100", 89: "L40S", 90: "H100, H200", 100: "B200"}  # by compute capability
WARP = 32
SHARED_LIMIT = 99 * 1024  # of a program on sm_89, the least of the four

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel for a card; bytes are those of a thread (`local`) and of a program (`shared`)."""

    kernel: str
    capability: int
    threads: int
    registers: int
    local: int
    shared: int


class _Target:
    """Triton's driver, for a device that does not exist."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)


def compile_launches(launch: Callable[[], object], capability: int) -> list[Compiled]:
    """Call `launch` on CPU tensors; compile the kernels that it would have launched, once each."""
    compiled: dict[Any, str] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel] = self.__name__
        return kernel

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(JITFunction, "run", compile_only),
        _active(_Target(capability)),
    ):
        launch()
    return [_inspect(name, kernel, capability) for kernel, name in compiled.items()]


@contextmanager
def _active(target: _Target) -> Iterator[None]:
    before = driver._active
    driver.set_active(cast(DriverBase, target))
    try:
        yield
    finally:
        driver._active = before


def _inspect(name: str, kernel: Any, capability: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    threads = kernel.metadata.num_warps * WARP
    local = usage["STACK"] + usage["LOCAL"]
    return Compiled(name.removesuffix("_kernel"), capability, threads, usage["REG"], local, kernel.metadata.shared)


def main() -> None:
    """Print a table of the published sizes."""
    from tests.kernels.launches import PUBLISHED, launches

    print("| kernel | card | threads | registers | spilled bytes | shared bytes |\n|---|---|---|---|---|---|")
    for launch in launches(PUBLISHED).values():
        for capability, card in CARDS.items():
            for k in compile_launches(launch, capability):
                print(
                    f"| {k.kernel} | sm_{capability} ({card}) | {k.threads} | {k.registers} | {k.local} | {k.shared} |"
                )


if __name__ == "__main__":
    main()
