"""What `glimmer generate` does: one request to a running server, with a spinner, and the pictures on disk."""

import base64
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
        GenerateError: the server is not there, refused the request or failed.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("waiting for the picture" if body.get("n", 1) == 1 else "waiting for the pictures")
        answer = _post(url.rstrip("/"), api_key, body)
    paths = _paths(output, len(answer["data"]))
    for path, image in zip(paths, answer["data"], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(image["b64_json"]))
        console.print(f"{path}  {answer['size']}  seed {image['seed']}", highlight=False)
    return paths


def _post(url: str, api_key: str | None, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # The server ends a request at its own timeout; only a dead connection should end it here.
        response = httpx.post(
            f"{url}/v1/images/generations", json=body, headers=headers, timeout=httpx.Timeout(None, connect=5.0)
        )
    except httpx.HTTPError as error:
        raise GenerateError(f"cannot reach {url} ({error}); is `glimmer serve` running?") from None
    if response.status_code != 200:
        raise GenerateError(_message(response))
    return response.json()


def _message(response: httpx.Response) -> str:
    """The server's own words; something else than this server may sit at the URL, so nothing is taken for granted."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{message} (HTTP {response.status_code})"


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
