"""The HTTP client of `glimmer generate`."""

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console

from server.cli.terminal import Display
from server.http_client import environment_errors, uses_environment

CONNECT_TIMEOUT_S = 5.0
_BAD_KEY = "the API key has characters other than printable ASCII"
READ_TIMEOUT_S = 60.0  # a live server sends at least a comment every few seconds

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class GenerateError(Exception):
    """The request failed; the user sees the message."""


@dataclass(frozen=True)
class Task:
    """A request and the files of its results.

    Args:
        body: JSON fields of the request.
        output: image file; several are numbered `name-1.ext`, `name-2.ext`, ...
        images: source images of an edit.
        partials: folder for partial images.
        plan_out: JSON file of the plan, numbered like `output`.
    """

    body: dict[str, Any]
    output: Path
    images: list[Path] = field(default_factory=list)
    mask: Path | None = None
    partials: Path | None = None
    plan_out: Path | None = None

    @property
    def count(self) -> int:
        """Return the number of images requested."""
        return self.body.get("n", 1)

    @property
    def outputs(self) -> list[Path]:
        """Return the image files in order."""
        return _numbered(self.output, self.count)


def format_of(output: Path) -> str:
    """Return the `output_format` for a file name.

    Raises:
        GenerateError: the suffix is not supported.
    """
    try:
        return _FORMATS[output.suffix.lower()]
    except KeyError:
        raise GenerateError(f"cannot write {output.name}: use one of {', '.join(_FORMATS)}") from None


def read_plan(path: Path) -> Any:
    """Read a plan that `Task.plan_out` has stored; the server validates it.

    Raises:
        GenerateError: the file is unreadable or not JSON.
    """
    try:
        return json.loads(_read(path))
    except ValueError:
        raise GenerateError(f"cannot read {path}: it is not JSON; --plan-out writes such a file") from None


def generate(url: str, api_key: str | None, task: Task, console: Console) -> list[Path]:
    """Send the request, show progress and return the files written.

    An interrupt closes the connection, and the server cancels the job.

    Raises:
        GenerateError: the request failed, or a file cannot be read or written.
    """
    for folder in (task.output.parent, task.partials, task.plan_out and task.plan_out.parent):
        if folder is not None:
            with _write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)  # fail now, not minutes later
    route, content = _content(task)
    with Display(console) as display, _open_stream(url.rstrip("/"), api_key, route, content) as response:
        written = _receive(response, task, display)
    if len(written) < task.count:
        raise GenerateError(f"the response of {response.url} ended after {len(written)} of {task.count} images")
    return written


def _content(task: Task) -> tuple[str, dict[str, Any]]:
    body = {**task.body, "stream": True, "response_format": "b64_json"}
    if task.plan_out is not None:
        body["return_plan"] = True
    if not task.images:
        return "/v1/images/generations", {"json": body}
    files = [("image[]", (path.name, _read(path), "application/octet-stream")) for path in task.images]
    if task.mask is not None:
        files.append(("mask", (task.mask.name, _read(task.mask), "application/octet-stream")))
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    return "/v1/images/edits", {"data": texts, "files": files}


@contextmanager
def _open_stream(url: str, api_key: str | None, route: str, content: dict[str, Any]) -> Iterator[httpx.Response]:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    has_begun = False
    try:
        target = httpx.URL(url + route)
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with environment_errors("cannot send the request", url):
            client = httpx.Client(timeout=timeout, trust_env=uses_environment(target))
        with client, client.stream("POST", target, **content, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise GenerateError(_error_message(response))
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                _raise_unexpected(response)
            has_begun = True
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if has_begun:
            raise GenerateError(f"the connection to {url} broke ({error})") from None
        if api_key and isinstance(error, httpx.LocalProtocolError):
            raise GenerateError(_BAD_KEY) from None
        raise GenerateError(f"cannot reach {url} ({error}); is `glimmer serve` running?") from None
    except UnicodeEncodeError as error:
        if api_key and error.object in (api_key, headers["authorization"]):
            raise GenerateError(_BAD_KEY) from None
        raise GenerateError("the prompt, or another value given, is not valid text") from None


def _receive(response: httpx.Response, task: Task, display: Display) -> list[Path]:
    """Show and write what the events contain; any server may be at the URL, so data may be malformed."""
    written = []
    try:
        for name, data in _events(_lines(response)):
            if name == "comment":
                display.show_progress(data)
            elif name.endswith(".partial_image"):
                _handle_partial(data, task, display)
            elif name.endswith(".completed"):
                written.append(_handle_completed(data, task, display))
            else:
                raise GenerateError(data["error"]["message"])
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        _raise_unexpected(response)
    return written


def _handle_partial(data: dict[str, Any], task: Task, display: Display) -> None:
    image, path = base64.b64decode(data["b64_json"]), task.outputs[data.get("image_index", 0)]
    display.draw(image)
    if task.partials is not None:
        _write(task.partials / f"{path.stem}-partial-{data['partial_image_index'] + 1}{path.suffix}", image)


def _handle_completed(data: dict[str, Any], task: Task, display: Display) -> Path:
    index = data.get("image_index", 0)
    path = task.outputs[index]
    line = f"{path}  {data['size']}  seed {data['seed']}"
    _write(path, base64.b64decode(data["b64_json"]))
    if task.plan_out is not None:
        _write(_numbered(task.plan_out, task.count)[index], json.dumps(data["plan"]).encode())
    display.print(line)
    return path


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield lines split at \\n alone: `Response.iter_lines` also splits at characters that JSON leaves unescaped."""
    pieces: list[bytes] = []
    for chunk in response.iter_bytes():
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]


def _events(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Parse server-sent events with one line of data each into (name, data); a comment is named "comment"."""
    name = ""
    for line in lines:
        if line.startswith(b":"):
            yield "comment", line[1:].decode(errors="replace").strip()
        elif line.startswith(b"event: "):
            name = line.removeprefix(b"event: ").decode(errors="replace")
        elif line.startswith(b"data: "):
            yield name, json.loads(line.removeprefix(b"data: "))
            name = ""


def _error_message(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{' '.join(str(message).split())} (HTTP {response.status_code})"


def _raise_unexpected(response: httpx.Response) -> NoReturn:
    raise GenerateError(f"{response.url} did not answer with images; is it a Glimmer server?") from None


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GenerateError(f"cannot read {path} ({error.strerror})") from None


def _write(path: Path, data: bytes) -> None:
    with _write_errors(path):
        path.write_bytes(data)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GenerateError(f"cannot write {path} ({error.strerror})") from None
