"""The `glimmer` command: its help, its settings, and `glimmer generate` against a live server."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from engine.config import EngineSettings
from engine.jobs.job import JobError
from engine.stop_signals import StopSignals
from models.nano import CHECKPOINT
from server.cli import commands as cli
from server.cli.client import GenerateError, format_of
from server.cli.terminal import Display, half_blocks
from server.processes import launch
from server.settings import ServerSettings
from tests import source_images
from tests.job_queue import JobQueue
from tests.packaging.files import ROOT
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, partial_image, plan_for, stub_image
from tests.waiting import until


def glimmer(*args: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.app, args, env={"COLUMNS": "200", **environment})


async def generate(*args: str) -> Result:
    """Run the command in a thread beside the server."""
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


def test_every_engine_setting_has_a_flag() -> None:
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?m)^  --([a-z-]+)", glimmer("engine", "--help").output)}
    assert flags - {"help"} == EngineSettings.model_fields.keys()


def test_a_wrong_value_gets_one_line() -> None:
    for arguments, line in {
        ("serve", "--port", "70000"): "GLIMMER_PORT: Input should be less than or equal to 65535",
        ("serve", "--engines", "0"): "GLIMMER_ENGINES: Input should be greater than or equal to 1",
        ("engine", "--redis-url", "x", "--lease-s", "0"): "GLIMMER_LEASE_S: Input should be greater than or equal to 1",
    }.items():
        answer = glimmer(*arguments)
        assert (answer.exit_code, answer.output) == (2, f"glimmer: {line}\n")


def test_limits_are_in_the_help() -> None:
    text = re.sub(r"\s+", " ", glimmer("serve", "--help").output)
    for limits in ("picks a free one (0..65535).", "one for each (1..256).", "the answer is 429 (0 or more)."):
        assert limits in text


def test_settings_are_checked_before_anything_starts() -> None:
    without = glimmer("api")
    wrong = glimmer("api", "--redis-url", "unix:///nowhere", GLIMMER_MAX_PIXELS="many")
    empty = glimmer("api", GLIMMER_REDIS_URL="")
    assert (without.exit_code, wrong.exit_code, empty.exit_code) == (2, 2, 2)
    assert "GLIMMER_REDIS_URL" in without.output
    assert "GLIMMER_MAX_PIXELS" in wrong.output
    assert "GLIMMER_REDIS_URL" in empty.output


@pytest.mark.parametrize(
    ("options", "names"), [([], ["glm-image"]), (["--model", str(CHECKPOINT)], ["a", str(CHECKPOINT)])]
)
def test_serve_answers_to_the_name_it_was_started_with(
    monkeypatch: pytest.MonkeyPatch, options: list[str], names: list[str]
) -> None:
    seen: list[ServerSettings] = []
    monkeypatch.setattr(launch, "run_all", lambda settings, *_: seen.append(settings) or 0)
    named = ["--served-model-name", "a"] if options else []
    assert glimmer("serve", *named, *options).exit_code == 0
    assert [settings.model_names for settings in seen] == [names]


async def test_several_images(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    output = tmp_path / "new" / "fox.webp"
    options = ["--n", "2", "--size", "128x64", "--seed", "5", "--steps", "3", "--guidance", "2.5", "--top-p", "0.5"]
    options += ["--quotes", "strict"]
    answer = await generate("a fox", "-o", str(output), "--url", live_server.url, *options)
    assert answer.exit_code == 0, answer.output
    spec = stub.specs[0]
    assert (spec.n, spec.num_inference_steps, spec.guidance_scale, spec.top_p) == (2, 3, 2.5, 0.5)
    assert spec.quotes == "strict"
    for index, seed in ((1, 5), (2, 6)):
        data = (output.parent / f"fox-{index}.webp").read_bytes()
        assert data == stub_image(spec, seed)
        assert Image.open(io.BytesIO(data)).size == (128, 64)
        assert f"seed {seed}" in answer.output


async def test_one_image(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    answer = await generate("a fox", "-o", str(tmp_path / "out.jpg"), "--url", live_server.url)
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "out.jpg").read_bytes().startswith(b"\xff\xd8")


async def test_refusals(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    refused = await generate("a fox", "-o", str(output), "--url", live_server.url, "--n", "11")
    assert refused.exit_code == 1
    assert "n takes a number of images, 1..10" in refused.output
    assert "(HTTP 400)" in refused.output
    unreachable = await generate("a fox", "-o", str(output), "--url", "http://127.0.0.1:9")
    assert unreachable.exit_code == 1
    assert "is `glimmer serve` running?" in unreachable.output
    assert not output.exists()


async def test_partial_images(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    options = ["--n", "2", "--seed", "5", "--partials", str(tmp_path / "partials of two")]
    answer = await generate("a fox", "-o", str(tmp_path / "fox.png"), "--url", live_server.url, *options)
    assert answer.exit_code == 0, answer.output
    kept = {path.name: path.read_bytes() for path in (tmp_path / "partials of two").iterdir()}
    assert kept == {
        f"fox-{image + 1}-partial-{index + 1}.png": partial_image(stub.specs[0], image, index).data
        for image in (0, 1)
        for index in (0, 1)
    }
    await generate("a fox", "-o", str(tmp_path / "fox.png"), "--url", live_server.url, "--partial-images", "3")
    assert stub.specs[1].partial_images == 3


async def test_an_edit(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (96, 64), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "red.png")
    blue.save(tmp_path / "blue.webp", lossless=True)
    mask = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (0, 0, 48, 64))
    mask.save(tmp_path / "mask.png")
    images = ["--edit", str(tmp_path / "red.png"), "--edit", str(tmp_path / "blue.webp")]
    options = [*images, "--mask", str(tmp_path / "mask.png"), "--seed", "3", "--guidance", "2.5", "--n", "1"]
    answer = await generate("=@bigger", "-o", str(tmp_path / "out.png"), "--url", live_server.url, *options)
    assert answer.exit_code == 0, answer.output
    spec, sources = stub.specs[0], stub.sources[0]
    assert (spec.prompt, spec.seed, spec.guidance_scale, spec.num_sources) == ("=@bigger", 3, 2.5, 2)
    assert sources is not None
    assert [Image.open(io.BytesIO(data)).getpixel((5, 5)) for data in sources.files] == [(255, 0, 0), (0, 0, 255)]
    made = Image.open(tmp_path / "out.png")
    assert made.getpixel((5, 5)) == (255, 0, 0)  # kept by the mask
    assert made.getpixel((90, 5)) != (255, 0, 0)


async def test_a_plan_can_be_saved_and_used_again(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    to_server = ["-o", str(tmp_path / "out.png"), "--url", live_server.url]
    several = await generate(
        "a fox", *to_server, "--n", "2", "--seed", "5", "--plan-out", str(tmp_path / "a" / "p.json")
    )
    assert several.exit_code == 0, several.output
    plans = [json.loads((tmp_path / "a" / f"p-{number}.json").read_text()) for number in (1, 2)]
    assert plans == [plan_for(stub.specs[0], seed).to_dict() for seed in (5, 6)]
    again = await generate("a fox", *to_server, "--plan-in", str(tmp_path / "a" / "p-2.json"))
    assert again.exit_code == 0, again.output
    assert stub.specs[1].plan == plans[1]
    refused = await generate("a fox", *to_server, "--size", "128x64", "--plan-in", str(tmp_path / "a" / "p-2.json"))
    assert refused.exit_code == 1
    assert re.fullmatch(r"glimmer: .*plan.*\(HTTP 400\)\n", refused.output)


async def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Check for one line with file and reason, printed before any request is sent."""
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    nowhere = ["-o", str(tmp_path / "out.png"), "--url", "http://127.0.0.1:9"]
    not_json = "it is not JSON; --plan-out writes"
    for options, line in {
        ("--edit", f"{tmp_path}/none.png"): f"cannot read {tmp_path}/none.png (No such file or directory)",
        ("--edit", str(tmp_path)): f"cannot read {tmp_path} (Is a directory)",
        ("--plan-in", f"{tmp_path}/none.json"): f"cannot read {tmp_path}/none.json (No such file or directory)",
        ("--plan-in", f"{tmp_path}/plan.json"): f"cannot read {tmp_path}/plan.json: {not_json}",
        (
            "--plan-in",
            f"{tmp_path}/bytes.json",
        ): f"cannot read {tmp_path}/bytes.json: {not_json}",
    }.items():
        answer = await generate("a fox", *nowhere, *options)
        assert answer.exit_code == 1
        assert answer.output.startswith(f"glimmer: {line}")
        assert answer.output.count("\n") == 1
    without_edit = await generate("a fox", *nowhere, "--mask", "mask.png")
    assert (without_edit.exit_code, "--mask goes with --edit" in without_edit.output) == (2, True)


async def test_a_failure_after_a_partial_image(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    stub.failures = {"a fox": JobError("The engine cannot.", "server_error", "internal_error")}
    partials = ["--partials", str(tmp_path / "partials"), "--partial-images", "1"]
    answer = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", live_server.url, *partials)
    assert (answer.exit_code, answer.output) == (1, "glimmer: The engine cannot.\n")
    assert [path.name for path in (tmp_path / "partials").iterdir()] == ["out-partial-1.png"]
    assert not (tmp_path / "out.png").exists()


async def test_an_interrupt_cancels_the_job(live_server: LiveServer, queue: JobQueue, tmp_path: Path) -> None:
    async def are(waiting: int, running: int) -> bool:
        stats = await queue.stats()
        return (stats.waiting, stats.running) == (waiting, running)

    command = [sys.executable, "-m", "server.cli", "generate", "a fox", "--url", live_server.url]
    async with StubEngine(queue, step_s=60):
        process = await asyncio.create_subprocess_exec(
            *command, "-o", str(tmp_path / "out.png"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        await until(lambda: are(waiting=0, running=1), seconds=60)
        process.send_signal(signal.SIGINT)
        await until(lambda: are(waiting=0, running=0), seconds=20)
        printed, _ = await process.communicate()
    assert process.returncode != 0
    assert b"Traceback" not in printed


@asynccontextmanager
async def fixed_response(*chunks: bytes) -> AsyncIterator[str]:
    """Yield the URL of a server that answers all requests with these chunks."""
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")  # the end of the request
        with suppress(ConnectionError):  # the client may disconnect early
            for chunk in (b"HTTP/1.1 200 OK\r\nconnection: close\r\n", *chunks):
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.close()
            await writer.wait_closed()
        done.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await done.wait()


EVENTS = b"content-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    "chunks",
    [
        (b"\r\n<html>",),
        (b"content-type: application/json\r\n\r\n[]",),
        (EVENTS, b"data: {\n\n"),
        (EVENTS, b"data: []\n\n"),
        (EVENTS, b'event: image_generation.completed\ndata: {"b64_json": "x", "seed": 1, "size": ""}\n\n'),
        (EVENTS, b'event: image_generation.completed\ndata: {"b64_json": ""}\n\n'),
        (EVENTS, b": running {\n\n"),
    ],
)
async def test_a_response_of_another_server(chunks: tuple[bytes, ...], tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    async with fixed_response(*chunks) as url:
        answered = await generate("a fox", "-o", str(output), "--url", url)
    assert answered.exit_code == 1
    assert "did not answer with images; is it a Glimmer server?" in answered.output
    assert not output.exists()


async def test_a_response_that_ends_early(tmp_path: Path) -> None:
    async with fixed_response(EVENTS, b": ping\n\n", b'event: image_generation.completed\ndata: {"b64') as url:
        answered = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", url)
    assert answered.exit_code == 1
    assert "ended after 0 of 1 images" in answered.output


async def test_a_response_in_pieces(tmp_path: Path) -> None:
    """Split anywhere, with characters that some libraries take for line ends."""
    data = '{"b64_json": "AAEC", "seed": 1, "size": "64x64", "revised_prompt": "a\u2028fox\x85"}'.encode()
    event = b"event: image_generation.completed\ndata: " + data + b"\n\n"
    pieces = [event[start : start + 7] for start in range(0, len(event), 7)]
    async with fixed_response(EVENTS, *pieces) as url:
        answered = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", url)
    assert answered.exit_code == 0, answered.output
    assert (tmp_path / "out.png").read_bytes() == bytes([0, 1, 2])


def test_a_terminal_shows_progress_and_draws() -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, color_system="truecolor", width=60, height=30)
    with Display(console) as display:
        for comment, shown in {
            'queued {"position":2}': "waiting, 2 before it",
            "ping": "waiting, 2 before it",
            'running {"phase":"rendering","step":3,"steps":20}': "3/20",
        }.items():
            display.show_progress(comment)
            display.draw(source_images.png(Image.new("RGB", (64, 64), (1, 2, 3))))
            display._live.refresh()
            assert shown in drawn.getvalue()
            drawn.truncate(0)
    for comment in ("queued {", 'running {"phase":"x"}', "running 3"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            display.show_progress(comment)


def test_without_a_terminal_nothing_is_drawn() -> None:
    printed = io.StringIO()
    with Display(Console(file=printed)) as display:
        display.show_progress('queued {"position":2}')
        display.draw(source_images.png(Image.new("RGB", (64, 64))))
        display.print("out.png")
    assert printed.getvalue() == "out.png\n"


def test_half_blocks() -> None:
    """Two pixels a character; wide and tall images keep their aspect ratio."""
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    drawing = half_blocks(source_images.png(image), columns=2, lines=9)
    assert drawing.plain == "▀▀\n"
    assert {str(span.style) for span in drawing.spans} == {"#ff0000 on #0000ff"}
    for size, shape in {(400, 100): (40, 5), (100, 400): (10, 20), (3000, 10): (40, 1)}.items():
        lines = half_blocks(source_images.png(Image.new("RGB", size)), columns=40, lines=20).plain.splitlines()
        assert (len(lines[0]), len(lines)) == shape


async def test_a_file_that_cannot_be_written(live_server: LiveServer, stub: StubEngine, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder.png", tmp_path / "file"
    folder.mkdir()
    file.touch()
    taken = await generate("a fox", "-o", str(folder), "--url", live_server.url)
    assert taken.exit_code == 1
    assert f"cannot write {folder} (Is a directory)" in taken.output
    requests = len(stub.specs)
    nowhere = await generate("a fox", "-o", str(file / "out.png"), "--url", live_server.url)
    assert nowhere.exit_code == 1
    assert f"cannot write {file} (" in nowhere.output
    assert len(stub.specs) == requests  # refused before the request


async def test_a_server_on_this_machine_is_reached_without_the_proxy(
    live_server: LiveServer, stub: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    answer = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", live_server.url)
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize("url", ["http://:8000", "ftp://127.0.0.1", "nonsense", "http://[::1"])
async def test_invalid_urls(url: str, tmp_path: Path) -> None:
    answer = await generate("a fox", "-o", str(tmp_path / "out.png"), "--url", url)
    assert answer.exit_code == 1
    assert f"cannot reach {url}" in answer.output


async def test_a_prompt_that_is_not_valid_text(tmp_path: Path) -> None:
    answer = await generate("a \udcff fox", "-o", str(tmp_path / "out.png"))
    assert answer.exit_code == 1
    assert "not valid text" in answer.output


def test_unknown_stages_are_refused() -> None:
    for stage in ("planner", "both"):
        answer = glimmer("engine", "--redis-url", "unix:///nowhere", "--stage", stage)
        assert answer.exit_code == 2
        assert "render" in answer.output


def test_no_progress_bars_in_the_engine_s_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are set before the libraries that draw bars are imported."""
    seen: dict[str, str | None] = {}

    class Worker(ModuleType):
        @property
        def main(self) -> Callable[[EngineSettings, StopSignals], int]:
            seen.update({name: os.environ.get(name) for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")})
            return lambda settings, signals: 0

    monkeypatch.setitem(sys.modules, "engine.worker.process", Worker("engine.worker.process"))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # the user's choice, which stays
    answer = glimmer("engine", "--redis-url", "unix:///nowhere")
    monkeypatch.delenv("TQDM_DISABLE")
    assert answer.exit_code == 0, answer.output
    assert seen == {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}


def test_formats_follow_the_file_name() -> None:
    assert [format_of(Path(name)) for name in ("a.png", "a.JPG", "a.jpeg", "a.webp")] == ["png", "jpeg", "jpeg", "webp"]
    with pytest.raises(GenerateError, match=r"\.webp"):
        format_of(Path("a.gif"))
