"""What `glimmer generate` does: one request to a running server, with a spinner, and the pictures on disk."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class GenerateError(Exception):
    """The pictures could not be had; the message says why and is meant for the user."""


def format_of(output: Path) -> str:
    """The `output_format` that a file name asks for.

    Raises:
        GenerateError: the suffix is none of those that can be made.
    """
    try:
        return _FORMATS[output.suffix.lower()]
    except KeyError:
        raise GenerateError(f"cannot write {output.name}: use one of {', '.join(_FORMATS)}") from None


def generate(url: str, api_key: str | None, body: dict[str, Any], output: Path, console: Console) -> list[Path]:
    """Asks the server at `url` for pictures and writes them to `output`, or to `name-1.ext`, `name-2.ext`, ...

    Raises:
        GenerateError: the server is not there, refused the request or failed, or the files cannot be written.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of waiting
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("waiting for the picture" if body.get("n", 1) == 1 else "waiting for the pictures")
        response = _post(url.rstrip("/"), api_key, body)
    if response.status_code != 200:
        raise GenerateError(_message(response))
    size, images = _pictures(response)
    paths = _paths(output, len(images))
    for path, (data, seed) in zip(paths, images, strict=True):
        with _writing(path):
            path.write_bytes(data)
        console.print(f"{path}  {size}  seed {seed}", highlight=False)
    return paths


def _post(url: str, api_key: str | None, body: dict[str, Any]) -> httpx.Response:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.post(
            f"{url}/v1/images/generations",
            json=body,
            headers=headers,
            # The server ends a request at its own timeout; only a dead connection should end it here.
            timeout=httpx.Timeout(None, connect=5.0),
            # A proxy from the environment would look for the server on its own machine.
            trust_env=not _is_loopback(httpx.URL(url).host),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise GenerateError(f"cannot reach {url} ({error}); is `glimmer serve` running?") from None
    except UnicodeEncodeError:
        raise GenerateError("the prompt, or another value given, is not valid text") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _pictures(response: httpx.Response) -> tuple[str, list[tuple[bytes, int]]]:
    """The size, and each picture with its seed. Something else than this server may sit at the URL, so nothing is
    taken for granted, here and in `_message`."""
    try:
        answer = response.json()
        return answer["size"], [(base64.b64decode(image["b64_json"]), image["seed"]) for image in answer["data"]]
    except (ValueError, KeyError, TypeError):
        raise GenerateError(f"{response.url} answered with something else than pictures; is it a Glimmer?") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GenerateError(f"cannot write {path} ({error.strerror})") from None


def _message(response: httpx.Response) -> str:
    """The server's own words."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{message} (HTTP {response.status_code})"


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
