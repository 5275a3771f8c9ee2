"""The services of `docker compose --profile fleet` as processes: their commands, variables and health checks."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from engine.child import die_with_parent
from engine.jobs.embedded import find_redis_server
from tests.packaging.files import ROOT, image_steps, last
from tests.packaging.test_compose import environment, seconds, services, target, with_defaults

README_REQUEST = {
    "prompt": 'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar',
    "seed": 1,
}
STARTED_S = 120.0


class Service:
    """A container's process: the command of its image, with its variables and a temporary folder of its own."""

    def __init__(self, name: str, folder: Path, replaced: dict[str, str]) -> None:
        self.name, self._folder = name, folder / name
        self._folder.mkdir()
        outside = {key: value for key, value in os.environ.items() if not key.startswith("GLIMMER_")}
        given = {key: value.replace("@redis:6379", replaced["redis"]) for key, value in environment(name).items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = outside | given | {"TMPDIR": str(self._folder), "HF_HOME": str(self._folder), "PATH": path}
        self._environment |= {key: value for key, value in replaced.items() if key in given}
        command = json.loads(last(image_steps(target(name)), "CMD") or "[]")
        self.process = self._start(command)

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        program = die_with_parent([sys.executable, "-m", "server.cli", *command], signal.SIGKILL)
        with (self._folder / "log").open("a") as log:
            return subprocess.Popen(program, env=self._environment, cwd=ROOT, stdout=log, stderr=log)

    def is_healthy(self) -> bool:
        """Run the health check of the image."""
        check = (last(image_steps(target(self.name)), "HEALTHCHECK") or "").partition("CMD ")[2]
        return self._start(json.loads(check)[1:]).wait() == 0

    def stop(self) -> int:
        """Return the exit code after SIGTERM, within the time that compose grants."""
        self.process.terminate()
        return self.process.wait(seconds(services()[self.name]["stop_grace_period"]))

    def log(self) -> str:
        return (self._folder / "log").read_text()


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[str, list[Service]]]:
    """Yield the API's URL and the services, all healthy."""
    redis_port, api_port = free_port(), free_port()
    program, *flags = (with_defaults(word) for word in services()["redis"]["command"])
    assert program == "redis-server"
    replaced = {"redis": f"@127.0.0.1:{redis_port}", "GLIMMER_PORT": str(api_port), "GLIMMER_HOST": "127.0.0.1"}
    with ExitStack() as stack:
        command = [str(find_redis_server()), *flags, "--port", str(redis_port), "--logfile", "redis.log"]
        redis = subprocess.Popen(die_with_parent(command, signal.SIGKILL), cwd=folder)
        stack.callback(redis.wait)
        stack.callback(redis.kill)
        running = [Service(name, folder, replaced) for name in ("api", "planner", "renderer")]
        for service in running:
            stack.callback(service.process.wait)
            stack.callback(service.process.kill)
        give_up_at = time.monotonic() + STARTED_S
        url = f"http://127.0.0.1:{api_port}"
        while not is_ready(url):
            is_starting = all(service.process.poll() is None for service in running) and time.monotonic() < give_up_at
            assert is_starting, [service.log() for service in running]
            time.sleep(0.2)
        yield url, running


def is_ready(url: str) -> bool:
    """Return whether both stages are there."""
    try:
        engines = httpx.get(f"{url}/health").json()["engines"]
    except httpx.TransportError:
        return False
    return {engine["stage"] for engine in engines if engine["state"] == "ready"} == {"plan", "render"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_the_image_of_the_readme_comes_out_of_a_planner_and_a_renderer(tmp_path: Path) -> None:
    with fleet(tmp_path) as (url, running):
        assert all(service.is_healthy() for service in running), [service.log() for service in running]
        response = httpx.post(f"{url}/v1/images/generations", json=README_REQUEST, timeout=300)
        assert response.status_code == 200, response.text
        made = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
        shown = Image.open(ROOT / "docs" / "star.png")
        assert made.size == shown.size
        difference = np.abs(np.asarray(made, dtype=np.int16)[..., :3] - np.asarray(shown, dtype=np.int16)[..., :3])
        assert difference.mean() < 1.0  # other threads round differently
        assert [service.stop() for service in reversed(running)] == [0, 0, 0]
