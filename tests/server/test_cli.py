"""The `glimmer` command: its help, its settings, and `glimmer generate` against a live server."""

import asyncio
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from engine.config import EngineSettings
from server import cli
from server.client import GenerateError, format_of
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, picture


def glimmer(*args: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.app, args, env={"COLUMNS": "200", **environment})


async def generate(*args: str) -> Result:
    """Runs the command in a thread, beside the server it asks."""
    return await asyncio.to_thread(glimmer, "generate", *args)


@pytest.mark.parametrize("command", ["serve", "api", "engine", "generate"])
def test_help(command: str) -> None:
    assert command in glimmer("--help").output
    answer = glimmer(command, "--help")
    assert answer.exit_code == 0
    assert "Usage: " in answer.output


@pytest.mark.parametrize("command", ["serve", "api", "engine"])
def test_every_flag_has_its_variable(command: str) -> None:
    text = re.sub(r"\s+", "", glimmer(command, "--help").output)
    flags = re.findall(r"(?m)^  --([a-z-]+)", glimmer(command, "--help").output)
    assert len(flags) >= 8
    for flag in flags:
        if flag != "help":
            assert f"GLIMMER_{flag.upper().replace('-', '_')}" in text


def test_the_engine_flags_are_all_of_its_settings() -> None:
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?m)^  --([a-z-]+)", glimmer("engine", "--help").output)}
    assert flags - {"help"} == set(EngineSettings.__dataclass_fields__)


def test_settings_are_checked_before_anything_starts() -> None:
    without = glimmer("api")
    wrong = glimmer("api", "--redis-url", "unix:///nowhere", GLIMMER_MAX_PIXELS="many")
    empty = glimmer("api", GLIMMER_REDIS_URL="")
    assert (without.exit_code, wrong.exit_code, empty.exit_code) == (2, 2, 2)
    assert "GLIMMER_REDIS_URL" in without.output
    assert "GLIMMER_MAX_PIXELS" in wrong.output
    assert "GLIMMER_REDIS_URL" in empty.output


async def test_several_pictures(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    output = tmp_path / "new" / "fox.webp"
    options = ["--n", "2", "--size", "128x64", "--seed", "5", "--steps", "3", "--guidance", "2.5", "--top-p", "0.5"]
    answer = await generate("a fox", "-o", str(output), "--url", live_server.url, *options)
    assert answer.exit_code == 0, answer.output
    spec = stub.specs[0]
    assert (spec.n, spec.num_inference_steps, spec.guidance_scale, spec.top_p) == (2, 3, 2.5, 0.5)
    for index, seed in ((1, 5), (2, 6)):
        data = (output.parent / f"fox-{index}.webp").read_bytes()
        assert data == picture(spec, seed)
        assert Image.open(io.BytesIO(data)).size == (128, 64)
        assert f"seed {seed}" in answer.output


async def test_one_picture(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    answer = await generate("a fox", "-o", str(tmp_path / "out.jpg"), "--url", live_server.url)
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "out.jpg").read_bytes().startswith(b"\xff\xd8")


async def test_refusals(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    refused = await generate("a fox", "-o", str(output), "--url", live_server.url, "--n", "11")
    assert refused.exit_code == 1
    assert "n takes a number of images, 1..10" in refused.output
    assert "(HTTP 400)" in refused.output
    nobody = await generate("a fox", "-o", str(output), "--url", "http://127.0.0.1:9")
    assert nobody.exit_code == 1
    assert "is `glimmer serve` running?" in nobody.output
    assert not output.exists()


@pytest.mark.parametrize(
    "body", ["<html>", "[]", '{"data": [{}]}', '{"data": [{"b64_json": "x", "seed": 1}], "size": ""}']
)
async def test_an_answer_from_something_else(body: str, tmp_path: Path) -> None:
    output = tmp_path / "out.png"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")  # the end of what was sent
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body.encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        answered = await generate("a fox", "-o", str(output), "--url", f"http://127.0.0.1:{port}")
    assert answered.exit_code == 1
    assert "answered with something else than pictures" in answered.output
    assert not output.exists()


async def test_a_file_that_cannot_be_written(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.touch()
    taken = await generate("a fox", "-o", str(folder), "--url", live_server.url)
    assert taken.exit_code == 1
    assert f"cannot write {folder} (Is a directory)" in taken.output
    asked = len(stub.specs)
    nowhere = await generate("a fox", "-o", str(file / "out.png"), "--url", live_server.url)
    assert nowhere.exit_code == 1
    assert f"cannot write {file} (" in nowhere.output
    assert len(stub.specs) == asked  # it is said before the picture is made


async def test_a_proxy_is_not_asked_for_a_server_on_this_machine(
    live_server: LiveServer, stub: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    answer = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", live_server.url)
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize("url", ["http://:8000", "ftp://127.0.0.1", "nonsense", "http://[::1"])
async def test_urls_that_are_none(url: str, tmp_path: Path) -> None:
    answer = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", url)
    assert answer.exit_code == 1
    assert f"cannot reach {url}" in answer.output


async def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    answer = await generate("a \udcff fox", "-o", str(tmp_path / "out.png"))
    assert answer.exit_code == 1
    assert "not valid text" in answer.output


def test_stages_that_do_not_exist_are_refused() -> None:
    for stage in ("plan", "render"):
        assert glimmer("engine", "--redis-url", "unix:///nowhere", "--stage", stage).exit_code == 2


def test_no_progress_bars_in_the_engine_s_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are set before anything that draws bars is imported."""
    seen: dict[str, str | None] = {}

    class Worker(ModuleType):
        @property
        def main(self) -> Callable[[EngineSettings], int]:
            seen.update({name: os.environ.get(name) for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")})
            return lambda settings: 0

    monkeypatch.setitem(sys.modules, "engine.process", Worker("engine.process"))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # somebody's choice, and it stays
    answer = glimmer("engine", "--redis-url", "unix:///nowhere")
    monkeypatch.delenv("TQDM_DISABLE")
    assert answer.exit_code == 0, answer.output
    assert seen == {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}


def test_formats_follow_the_file_name() -> None:
    assert [format_of(Path(name)) for name in ("a.png", "a.JPG", "a.jpeg", "a.webp")] == ["png", "jpeg", "jpeg", "webp"]
    with pytest.raises(GenerateError, match=r"\.webp"):
        format_of(Path("a.gif"))
