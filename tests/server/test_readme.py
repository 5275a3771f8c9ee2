"""The README's examples, run as they are written there, against a live server with a stub engine."""

import asyncio
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.packaging.files import ROOT
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine

GLIMMER = [sys.executable, "-m", "server.cli"]
ADDRESS = "http://127.0.0.1:8000"


def example(language: str, start: str) -> str:
    """The one block of code in this language that starts so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if block.startswith(start)]
    return found


async def run(folder: Path, *command: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "*", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return printed.decode()


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}


async def test_python(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    code = example("python", "import base64")
    assert ADDRESS in code
    printed = await run(tmp_path, sys.executable, "-c", code.replace(ADDRESS, live_server.url))
    assert pictures(tmp_path) == {"sale-1.png", "edited.png", "latest.png", "again.png"}
    assert f"{live_server.url}/v1/files/" in printed
    assert "image.job" in printed
    first, edit, stream, planned, again, *_ = stub.specs
    assert (first.n, first.seed, first.num_inference_steps, edit.num_sources, stream.partial_images) == (2, 7, 12, 1, 2)
    assert (planned.return_plan, again.plan is not None) == (True, True)


async def test_curl(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    missing = [name for name in ("bash", "curl", "jq", "base64") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"the examples use {', '.join(missing)}")
    code = example("sh", "api=")
    assert ADDRESS in code
    printed = await run(tmp_path, "bash", "-euo", "pipefail", "-c", code.replace(ADDRESS, live_server.url))
    assert pictures(tmp_path) == {"open.png", "edited.png", "again.png"}
    assert f"{live_server.url}/v1/files/" in printed
    for line in ("event: image_generation.partial_image", "event: image_generation.completed", "event: completed"):
        assert line in printed
    assert printed.endswith("succeeded\n")
    assert [spec.num_sources for spec in stub.specs] == [0, 1, 0, 0, 0, 0, 0]


async def test_the_command_line(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    lines = example("sh", ".venv/bin/glimmer generate").splitlines()
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == ".venv/bin/glimmer"
        await run(tmp_path, *GLIMMER, *arguments, GLIMMER_URL=live_server.url)
    assert pictures(tmp_path) == {"star.png", "sale.png", "green.png", "open.png", "shut.png"}
    assert pictures(tmp_path / "on-the-way") == {"open-partial-1.png", "open-partial-2.png"}
    assert stub.specs[-1].plan is not None


async def test_the_commands_for_operators_exist(tmp_path: Path) -> None:
    """`--help` behind each: its flags are parsed before, and nothing is started."""
    for line in example("sh", ".venv/bin/glimmer key").splitlines():
        program, *arguments = shlex.split(line.partition(">>")[0], comments=True)
        if program == ".venv/bin/glimmer":
            assert "Usage: " in await run(tmp_path, *GLIMMER, *arguments, "--help")
