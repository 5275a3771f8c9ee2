"""`make demo` always stops its server. A fake `glimmer` is the server and the client."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.jobs.job import EngineInfo
from models.nano.recipe.prompts import describe, random_poster
from server.cli import demo
from server.processes.launch import _announce
from tests.packaging.files import ROOT

# `serve` prints that it is ready and waits for SIGINT; `generate` ends, fails or waits, depending on FAKE.
FAKE_GLIMMER = """
import os, signal, sys, time
from pathlib import Path

if sys.argv[1] == "serve":
    assert "GLIMMER_REDIS_URL" not in os.environ
    if os.environ["FAKE"] == "broken":
        sys.exit("no such checkpoint")
    def stop(sig, frame):
        Path("stopped").touch()
        sys.exit()
    signal.signal(signal.SIGINT, stop)
    print("Glimmer is ready at http://127.0.0.1:1 (model x)", flush=True)
    time.sleep(60)
elif os.environ["FAKE"] == "waits":
    Path("asked").touch()
    time.sleep(60)
elif os.environ["FAKE"] == "fails":
    sys.exit(1)
"""

RUN_DEMO = "import sys; from server.cli import demo; demo.GLIMMER = (sys.executable, 'fake.py'); demo.main()"


def start(folder: Path, behaviour: str) -> subprocess.Popen[str]:
    (folder / "fake.py").write_text(FAKE_GLIMMER)
    environment = {**os.environ, "FAKE": behaviour, "PYTHONPATH": str(ROOT), "GLIMMER_REDIS_URL": "redis://nowhere"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN_DEMO],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


def test_a_demo_that_works_prints_where_the_image_is(tmp_path: Path) -> None:
    code, printed = end(start(tmp_path, "works"))
    assert (code, "The image is out/demo.png" in printed) == (0, True), printed
    assert "make serve ARGS='--model zai-org/GLM-Image'" in printed
    assert (tmp_path / "stopped").exists()


def test_a_demo_without_an_image_fails_and_stops_its_server(tmp_path: Path) -> None:
    code, printed = end(start(tmp_path, "fails"))
    assert (code, "out/demo.log" in printed) == (1, True), printed
    assert (tmp_path / "stopped").exists()


def test_the_log_of_a_server_that_does_not_start_is_printed(tmp_path: Path) -> None:
    code, printed = end(start(tmp_path, "broken"))
    assert (code, "no such checkpoint" in printed) == (1, True), printed


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_stops_its_server(tmp_path: Path, sig: signal.Signals) -> None:
    process = start(tmp_path, "waits")
    timeout_at = time.monotonic() + 60
    while not (tmp_path / "asked").exists() and time.monotonic() < timeout_at:
        time.sleep(0.02)
    process.send_signal(sig)
    code, _ = end(process)
    assert code != 0
    assert (tmp_path / "stopped").exists()


def test_the_request_that_the_demo_suggests_works(tmp_path: Path) -> None:
    """It gets as far as connecting to a server. Its words, and the demo's own, are among those that the small model was
    trained on."""
    _, printed = end(start(tmp_path, "works"))
    [line] = re.findall(r"^  \.venv/bin/glimmer (.*)$", printed, re.MULTILINE)
    command = shlex.split(line)
    run = subprocess.run(
        [*demo.GLIMMER, *command, "--url", "http://127.0.0.1:9"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, "cannot reach" in run.stderr) == (1, True), run.stderr
    rng = Random(0)
    known = {word for _ in range(2000) for word in words(describe(random_poster(rng), rng))}
    assert words(demo.PROMPT) | words(command[1]) <= known


def words(prompt: str) -> set[str]:
    """Return the words outside quotes, which may contain any text."""
    return set(re.findall(r"[a-z]+", re.sub(r"""["'“「].*?["'”」]""", "", prompt.lower())))


async def test_the_demo_recognizes_the_server_s_announcement(capsys: pytest.CaptureFixture[str]) -> None:
    class OneEngine:
        async def engines(self) -> list[EngineInfo]:
            return [EngineInfo("engine-0", 1, "all", "ready", "model", "256x256", 512, 2048)]

    queue: Any = OneEngine()
    await _announce(queue, "http://127.0.0.1:4711")
    found = demo.READY.search(capsys.readouterr().out)
    assert found
    assert found[1] == "http://127.0.0.1:4711"
