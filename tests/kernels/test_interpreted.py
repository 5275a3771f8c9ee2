"""Run the kernels' tests under Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import ON_LINUX_X86

FOLDER = Path(__file__).parent


@pytest.mark.skipif(not ON_LINUX_X86, reason="Triton has wheels for Linux on x86-64 alone")
def test_interpreted() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    modules = sorted(map(str, FOLDER.glob("interpreted_*.py")))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *modules],
        env=environment | {"TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
