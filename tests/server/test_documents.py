"""The examples of README.md and docs/api.md, run as they are written there against a live server with a stub engine.

The commands of docs/operations.md are parsed, not run.
"""

import asyncio
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from server.requests.schemas import UNSUPPORTED, EditRequest, GenerationRequest
from tests.packaging.files import ROOT
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine

README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "api.md").read_text()
GLIMMER = [sys.executable, "-m", "server.cli"]
ADDRESS = "http://127.0.0.1:8000"


def examples(language: str, page: str = PAGE) -> list[str]:
    """Return the page's blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


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


def png_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}


async def test_the_readme(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    """Runs all examples but the one that starts the server."""
    [code] = examples("python", README)
    shell = [block for block in examples("sh", README) if "glimmer generate" in block or "curl" in block]
    assert len(shell) == 2
    script = "\n".join(shell).replace(".venv/bin/glimmer", shlex.join(GLIMMER)).replace(ADDRESS, live_server.url)
    printed = await run(tmp_path, "bash", "-euo", "pipefail", "-c", script, GLIMMER_URL=live_server.url)
    assert '"object":"image.job"' in printed
    await run(tmp_path, sys.executable, "-c", code.replace(ADDRESS, live_server.url))
    assert png_files(tmp_path) == {"star.png", "green.png", "sale.png", "latest.png", "again.png"}
    assert [spec.num_sources for spec in stub.specs[:2]] == [0, 1]


async def test_python(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    code = "\n".join(examples("python"))
    assert ADDRESS in code
    printed = await run(tmp_path, sys.executable, "-c", code.replace(ADDRESS, live_server.url))
    written = {"sale-1.png", "sale-2.png", "edited.png", "mask.png", "masked.png", "latest.png", "again.png"}
    assert png_files(tmp_path) == written
    assert "image_generation.partial_image\nimage_generation.partial_image\nimage_generation.completed\n" in printed
    assert f"{live_server.url}/v1/files/" in printed
    assert "image.job" in printed
    first, edit, masked, stream, planned, again, *_ = stub.specs
    assert (first.n, first.seed, first.num_inference_steps) == (2, 7, 12)
    assert (edit.num_sources, masked.num_sources, stream.partial_images) == (1, 1, 2)
    assert [sources.overlay is not None for sources in stub.sources[1:3] if sources] == [False, True]
    assert (planned.return_plan, again.plan is not None) == (True, True)


async def test_curl(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    missing = [name for name in ("bash", "curl", "jq", "base64") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"the examples use {', '.join(missing)}")
    [code] = [block for block in examples("sh") if block.startswith("api=")]
    assert ADDRESS in code
    printed = await run(tmp_path, "bash", "-euo", "pipefail", "-c", code.replace(ADDRESS, live_server.url))
    assert png_files(tmp_path) == {"open.png", "edited.png", "red.png", "again.png"}
    assert f"{live_server.url}/v1/files/" in printed
    for line in ("event: image_generation.partial_image", "event: image_generation.completed", "event: completed"):
        assert line in printed
    assert printed.endswith("succeeded\n")
    assert [spec.num_sources for spec in stub.specs] == [0, 1, 1, 0, 0, 0, 0, 0]


async def test_the_command_line(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    [lines] = [block for block in examples("sh") if block.startswith(".venv/bin/glimmer generate")]
    for line in lines.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == ".venv/bin/glimmer"
        await run(tmp_path, *GLIMMER, *arguments, GLIMMER_URL=live_server.url)
    assert png_files(tmp_path) == {"star.png", "sale.png", "green.png", "open.png", "shut.png"}
    assert png_files(tmp_path / "partials") == {"open-partial-1.png", "open-partial-2.png"}
    assert stub.specs[-1].plan is not None


def test_every_field_of_a_request_is_described() -> None:
    described = {
        name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    without_effect = re.search(r"without effect, and not logged: (.*?)\n\n", PAGE, re.DOTALL)
    assert without_effect
    described |= set(re.findall("`(.*?)`", without_effect[1]))
    assert GenerationRequest.model_fields.keys() <= described
    assert all(f"`{name}`" in PAGE for name in (*EditRequest.model_fields, *UNSUPPORTED))


async def test_the_commands_for_operators_exist(tmp_path: Path) -> None:
    """Runs each with `--help`: its flags are parsed first, and nothing is started."""
    page = (ROOT / "docs" / "operations.md").read_text()
    commands = re.findall(r"^\.venv/bin/glimmer .*$", page, re.MULTILINE)
    assert len(commands) > 5
    for line in commands:
        _, *arguments = shlex.split(line.partition(">>")[0], comments=True)
        assert "Usage: " in await run(tmp_path, *GLIMMER, *arguments, "--help")
