"""The choice between kernels and torch where no kernel can run."""

import subprocess
import sys

import torch

from models.glm_image.config import PlannerConfig
from models.glm_image.kernels.check import DecodeKernels, choose_kernels


def test_on_a_cpu_no_kernel_is_used_and_none_fails() -> None:
    chosen = choose_kernels(PlannerConfig(), torch.float32, torch.device("cpu"), block_size=32, max_length=4096)
    assert chosen == DecodeKernels()
    assert chosen.failures == {}


def test_engines_start_without_triton() -> None:
    """Import Triton only with a kernel: installs for CPUs lack it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, engine.engine\n"
        "from models.glm_image.config import PlannerConfig\n"
        "from models.glm_image.kernels.check import choose_kernels\n"
        "for interpreted in ('0', '1'):\n"
        "    os.environ['TRITON_INTERPRET'] = interpreted\n"
        "    chosen = choose_kernels(PlannerConfig(head_dim=16, hidden_size=32, intermediate_size=32),\n"
        "        torch.float32, torch.device('cpu'), block_size=16, max_length=32)\n"
        "    print(len(chosen.failures), set(chosen.failures.values()))"
    )
    run = subprocess.run([sys.executable, "-c", "import os; " + code], capture_output=True, text=True, check=True)
    nothing, everything = run.stdout.splitlines()
    assert nothing == "0 set()"
    assert everything.startswith("6 {")
    assert "triton" in everything
