"""`glimmer serve` as a user starts it: HTTP, Redis, planner, renderer, PNG; and an engine killed while it works."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from engine.jobs.job import JobSpec
from models.glm_image.config import RequestDefaults
from models.glm_image.model import GlmImage
from models.nano import CHECKPOINT
from tests.checkpoints import small_engine


def serve_command(folder: Path) -> list[str]:
    """Return the command that serves on a free port, with its data in the folder."""
    return [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        "--port",
        "0",
        "--drain-delay-s",
        "0",
        "--data-dir",
        str(folder / "data"),
    ]


class Server:
    """A `glimmer serve` process on a free port with its own Redis."""

    def __init__(self, folder: Path, *arguments: str):
        self.log = folder / "serve.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GLIMMER_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*serve_command(folder), *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.url = self._wait_until_ready()

    def _wait_until_ready(self) -> str:
        for _ in range(600):
            ready = re.search(r"Glimmer is ready at (http://\S+)", self.log.read_text())
            if ready:
                return ready[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def post(self, **body: object) -> dict:
        response = httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve"), "--model", str(checkpoint))
    yield running
    assert running.stop() == 0, running.log.read_text()


def test_a_request_gets_the_engine_s_images(server: Server, model: GlmImage) -> None:
    body = {"prompt": 'top headline "HELLO"', "size": "100x64", "seed": 5, "num_inference_steps": 3, "n": 2}
    response = server.post(**body, return_plan=True)
    spec = JobSpec(body["prompt"], 100, 64, seed=5, n=2, num_inference_steps=3)
    [expected] = small_engine(model).generate([spec])
    for index, item in enumerate(response["data"]):
        image = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        assert (image.format, image.size, image.mode) == ("PNG", (100, 64), "RGB")
        assert np.array_equal(np.asarray(image), expected[index].numpy())
        assert item["seed"] == 5 + index
        plan = item["plan"]
        assert len(plan["tokens"]) == plan["rows"] * plan["cols"] == spec.geometry.plan.tokens
        assert len(plan["preview"]["tokens"]) == plan["preview"]["rows"] * plan["preview"]["cols"]
    usage = response["usage"]
    assert usage["output_tokens"] == spec.plan_tokens
    assert usage["input_tokens"] == len(model.prompts.encode(body["prompt"], 64, 128))


def test_a_plan_sent_back_gives_the_same_image(server: Server) -> None:
    body = {"prompt": "again", "size": "64x64", "seed": 1, "num_inference_steps": 2}
    first = server.post(**body, return_plan=True)["data"][0]
    again = server.post(**body, plan=first["plan"])["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_an_error_of_the_engine_reaches_the_client(server: Server) -> None:
    body = {"prompt": "a <|image|> of a cat", "size": "64x64"}
    response = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert "<|image|>" in response.json()["error"]["message"]


def test_the_default_size_is_the_checkpoint_s(server: Server) -> None:
    response = server.post(prompt="x", num_inference_steps=1)
    assert response["size"] == "256x256"


def test_an_engine_killed_with_eight_jobs_running_fails_no_request(server: Server) -> None:
    """Check that all succeed with the bytes of an undisturbed run, and that no job is left."""
    bodies = [
        {"prompt": f"job {i} 'w'", "size": "256x192", "seed": i, "num_inference_steps": 140 + i} for i in range(8)
    ]
    undisturbed = [server.post(**body)["data"][0]["b64_json"] for body in bodies]
    [engine] = server.health()["engines"]
    with ThreadPoolExecutor(8) as clients:
        responses = [clients.submit(server.post, **body) for body in bodies]
        for _ in range(400):
            if server.health()["queue"]["running"] == 8:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the jobs did not all run at once")
        assert not any(response.done() for response in responses)
        os.kill(engine["pid"], signal.SIGKILL)
        images = [response.result()["data"][0]["b64_json"] for response in responses]
    assert images == undisturbed
    health = server.health()
    assert health["queue"] == {"waiting": 0, "running": 0}
    assert [e["pid"] for e in health["engines"]] != [engine["pid"]]


def test_without_a_model_the_shipped_one_renders_with_its_defaults(tmp_path: Path) -> None:
    defaults = RequestDefaults.read(CHECKPOINT / "glimmer.json")
    running = Server(tmp_path)
    try:
        response = running.post(prompt='a red poster, headline "HELLO"', seed=1)
        model = httpx.get(f"{running.url}/v1/models", timeout=10).json()["data"][0]["id"]
    finally:
        assert running.stop() == 0
    log = running.log.read_text()
    assert "(model glimmer-nano;" in log
    assert str(CHECKPOINT.parent) not in log
    assert model == "glm-image"
    assert response["size"] == defaults.size
    assert f"steps={defaults.num_inference_steps}" in log
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(response["data"][0]["b64_json"]))).convert("RGB"))
    red, green, blue = np.median(image.reshape(-1, 3), axis=0)
    assert red > 150 > 100 > max(green, blue)


def test_a_checkpoint_that_cannot_be_loaded_ends_serve_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    command = [*serve_command(tmp_path), "--model", str(broken)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "has no model_index.json" in ended.stderr
