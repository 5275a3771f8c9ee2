"""What `glimmer generate` does: one request to a running server, its progress, and the pictures on disk."""

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console

from server.addresses import is_loopback
from server.cli.terminal import Display

SILENCE_S = 60.0  # a stream has a ping every few seconds, so that a dead connection is told from a slow picture

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class GenerateError(Exception):
    """The pictures could not be had; the message says why and is meant for the user."""


@dataclass(frozen=True)
class Task:
    """What to ask for, and where it goes.

    Args:
        body: fields of the request.
        output: file of the picture; of several, `name-1.ext`, `name-2.ext`, ...
        images: pictures to edit; with none a picture is made from text alone.
        mask: where the first of them may change.
        partials: folder for the partial images; None keeps none.
        plan_out: file of the plan, as JSON; of several like `output`.
    """

    body: dict[str, Any]
    output: Path
    images: list[Path] = field(default_factory=list)
    mask: Path | None = None
    partials: Path | None = None
    plan_out: Path | None = None

    @property
    def count(self) -> int:
        """How many pictures are asked for."""
        return self.body.get("n", 1)

    @property
    def outputs(self) -> list[Path]:
        """The files of the pictures, in order."""
        return _numbered(self.output, self.count)


def format_of(output: Path) -> str:
    """The `output_format` that a file name asks for.

    Raises:
        GenerateError: the suffix is none of those that can be made.
    """
    try:
        return _FORMATS[output.suffix.lower()]
    except KeyError:
        raise GenerateError(f"cannot write {output.name}: use one of {', '.join(_FORMATS)}") from None


def read_plan(path: Path) -> Any:
    """A plan as `Task.plan_out` writes it; what is in it is for the server to check.

    Raises:
        GenerateError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(_read(path))
    except ValueError:
        raise GenerateError(f"cannot read {path}: it is no JSON; --plan-out writes such a file") from None


def generate(url: str, api_key: str | None, task: Task, console: Console) -> list[Path]:
    """Asks the server at `url` for pictures and writes them as they come, partial images too, with a progress bar and
    the latest partial image if the console is a terminal. A server whose client is interrupted stops working on it.

    Raises:
        GenerateError: the server is not there, refused the request or failed, or a file cannot be read or written.
    """
    for folder in (task.output.parent, task.partials, task.plan_out and task.plan_out.parent):
        if folder is not None:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)  # now, not after minutes of waiting
    route, content = _content(task)
    with Display(console) as display, _posted(url.rstrip("/"), api_key, route, content) as response:
        written = _receive(response, task, display)
    if len(written) < task.count:
        raise GenerateError(f"the answer of {response.url} ended after {len(written)} of {task.count} pictures")
    return written


# --- what goes out ----------------------------------------------------------------------------------------------------


def _content(task: Task) -> tuple[str, dict[str, Any]]:
    """The route, and the body as httpx takes it: JSON, or for an edit a form."""
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
def _posted(url: str, api_key: str | None, route: str, content: dict[str, Any]) -> Iterator[httpx.Response]:
    """The beginning of the server's answer, which is a stream of events.

    Raises:
        GenerateError: it is none, or the connection breaks, also later.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    has_begun = False
    try:
        with httpx.stream(
            "POST",
            url + route,
            **content,
            headers=headers,
            timeout=httpx.Timeout(SILENCE_S, connect=5.0),
            # A proxy from the environment would look for the server on its own machine.
            trust_env=not is_loopback(httpx.URL(url).host),
        ) as response:
            if response.status_code != 200:
                response.read()
                raise GenerateError(_message(response))
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                _not_ours(response)
            has_begun = True
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if has_begun:
            raise GenerateError(f"the connection to {url} broke ({error})") from None
        raise GenerateError(f"cannot reach {url} ({error}); is `glimmer serve` running?") from None
    except UnicodeEncodeError:
        raise GenerateError("the prompt, or another value given, is not valid text") from None


# --- what comes back --------------------------------------------------------------------------------------------------


def _receive(response: httpx.Response, task: Task, display: Display) -> list[Path]:
    """Shows and writes what the events bring. Something else than this server may sit at the URL, so nothing is taken
    for granted.

    Raises:
        GenerateError: the server failed, sent something else, or a file cannot be written.
    """
    written = []
    try:
        for name, data in _events(_lines(response)):
            if name == "comment":
                display.tell(data)
            elif name.endswith(".partial_image"):
                _keep_partial(data, task, display)
            elif name.endswith(".completed"):
                written.append(_keep(data, task, display))
            else:
                raise GenerateError(data["error"]["message"])
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        _not_ours(response)
    return written


def _keep_partial(data: dict[str, Any], task: Task, display: Display) -> None:
    picture, path = base64.b64decode(data["b64_json"]), task.outputs[data.get("image_index", 0)]
    display.draw(picture)
    if task.partials is not None:
        _write(task.partials / f"{path.stem}-partial-{data['partial_image_index'] + 1}{path.suffix}", picture)


def _keep(data: dict[str, Any], task: Task, display: Display) -> Path:
    index = data.get("image_index", 0)
    path = task.outputs[index]
    line = f"{path}  {data['size']}  seed {data['seed']}"
    _write(path, base64.b64decode(data["b64_json"]))
    if task.plan_out is not None:
        _write(_numbered(task.plan_out, task.count)[index], json.dumps(data["plan"]).encode())
    display.print(line)
    return path


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Without their ends. (`Response.iter_lines` also ends lines at characters that JSON leaves as they are.)"""
    pieces: list[bytes] = []
    for chunk in response.iter_bytes():
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]


def _events(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """The events of a stream by name, each with what its one line of data says; a comment is one called "comment".

    Raises:
        ValueError: the data is no JSON.
    """
    name = ""
    for line in lines:
        if line.startswith(b":"):
            yield "comment", line[1:].decode(errors="replace").strip()
        elif line.startswith(b"event: "):
            name = line.removeprefix(b"event: ").decode(errors="replace")
        elif line.startswith(b"data: "):
            yield name, json.loads(line.removeprefix(b"data: "))
            name = ""


def _message(response: httpx.Response) -> str:
    """The server's own words."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{message} (HTTP {response.status_code})"


def _not_ours(response: httpx.Response) -> NoReturn:
    raise GenerateError(f"{response.url} answered with something else than pictures; is it a Glimmer?") from None


# --- files ------------------------------------------------------------------------------------------------------------


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
    with _writing(path):
        path.write_bytes(data)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GenerateError(f"cannot write {path} ({error.strerror})") from None
