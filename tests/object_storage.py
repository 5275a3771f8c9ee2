"""Object storage with the interface of S3: moto's server, as a process on loopback."""

import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

import httpx

from engine.child import die_with_parent

START_S = 60.0
MORTAL_BUCKET = "images"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "glimmer", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-central-1"}


class ObjectStorage:
    """A server that can be killed, with its objects, and started again at the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL_S3": self.url}

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            die_with_parent(command, signal.SIGKILL), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        transport = httpx.HTTPTransport(retries=20)  # with pauses that double
        with httpx.Client(transport=transport, timeout=START_S) as client:
            client.get(self.url)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def make_bucket(self, name: str) -> None:
        httpx.put(f"{self.url}/{name}").raise_for_status()

    def keys(self, bucket: str) -> set[str]:
        """Return the keys of the objects in a bucket."""
        listing = httpx.get(f"{self.url}/{bucket}", params={"list-type": "2"}).raise_for_status().text
        return {part.partition("</Key>")[0] for part in listing.split("<Key>")[1:]}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
