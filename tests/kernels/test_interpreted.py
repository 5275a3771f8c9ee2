"""Run the kernels' tests under Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import ON_LINUX_X86

FOLDER = Path(__file__).parent


@pytest.mark.skipif(not ON_LINUX_X86, reason="Triton has wheels for Linux on x86-64 alone")
@pytest.mark.parametrize("module", sorted(FOLDER.glob("interpreted_*.py")), ids=lambda path: path.stem)
def test_interpreted(module: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(module)]
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
