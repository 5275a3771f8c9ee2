"""Using the playground."""

import asyncio
import io
import json
import os
import shlex
import sys
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from PIL import Image
from playwright.async_api import Browser, Locator, Page, expect

from engine.geometry import Geometry
from engine.jobs.job import Claim, JobError, JobSpec
from server.admission.queue_state import CACHE_TTL_S
from server.settings import ServerSettings
from tests import source_images
from tests.browser.conftest import open_page
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, partial_image, stub_image
from tests.waiting import until

Colour = tuple[int, int, int]

# Records every change of the first tile: number of partial images, whether it is done, shape of its plan.
RECORD = """
window.seen = [];
new MutationObserver(() => {
  const tile = document.querySelector(".tile");
  if (!tile || tile.querySelector("img").hidden) return;
  const { width, height } = tile.querySelector("canvas");
  const line = [tile.dataset.partials, tile.classList.contains("done"), width, height].join();
  if (window.seen.at(-1) !== line) window.seen.push(line);
}).observe(document.getElementById("tiles"), { subtree: true, childList: true, attributes: true });
"""

COLOUR = """
async (image) => {
  await image.decode();
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  context.drawImage(image, 0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
"""


def colour_of(data: bytes) -> Colour:
    colour = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour  # type: ignore[return-value]


async def shown(image: Locator) -> Colour:
    red, green, blue = await image.evaluate(COLOUR)
    return red, green, blue


class HaltingEngine(StubEngine):
    """Stops after the first partial image of each image until `may_go_on` is set."""

    def __init__(self, queue: JobQueue):
        super().__init__(queue)
        self.may_go_on = asyncio.Event()

    async def _run(self, claim: Claim) -> None:
        for image in range(claim.spec.n):
            await self._queue.partial_image(claim, partial_image(claim.spec, image, 0))
        await self._queue.progress(claim, {"phase": "rendering", "step": 3, "steps": 20})
        await self.may_go_on.wait()
        await super()._run(claim)


async def ask(page: Page, prompt: str, **fields: Any) -> None:
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        await page.locator(f"#{name}").fill(str(value))
    await page.get_by_role("button", name="Generate", exact=True).click()


async def make(page: Page, prompt: str, **fields: Any) -> None:
    """Request an image and wait until it is in the history."""
    before = await page.locator("#thumbs li").count()
    await ask(page, prompt, **fields)
    await expect(page.locator("#thumbs li")).to_have_count(before + int(fields.get("n", 1)))


def are(queue: JobQueue, waiting: int, running: int) -> Awaitable[None]:
    async def check() -> bool:
        stats = await queue.stats()
        return (stats.waiting, stats.running) == (waiting, running)

    return until(check, seconds=60)


async def test_partial_images_come_before_the_final_image(page: Page, queue: JobQueue) -> None:
    await page.evaluate(RECORD)
    async with StubEngine(queue, step_s=0.2) as stub:
        await make(page, "a fox", size="96x64", num_inference_steps=6, seed=5)
    (spec,) = stub.specs
    assert (spec.prompt, spec.width, spec.height, spec.num_inference_steps, spec.seed) == ("a fox", 96, 64, 6, 5)
    geometry = Geometry(96, 64)
    preview = f"{geometry.preview.cols},{geometry.preview.rows}"
    plan = f"{geometry.plan.cols},{geometry.plan.rows}"
    seen = await page.evaluate("window.seen")
    assert seen == [f"1,false,{preview}", f"2,false,{plan}", f"2,true,{plan}"]
    assert await shown(page.locator(".tile img")) == colour_of(stub_image(spec, 5))
    await expect(page.locator("#status")).to_have_text("Done")
    await expect(page.locator(".caption")).to_have_text("seed 5")


async def test_a_partial_image_and_progress_while_the_job_runs(page: Page, queue: JobQueue) -> None:
    async with HaltingEngine(queue) as stub:
        await ask(page, "a fox", seed=5)
        await expect(page.locator("#status")).to_have_text("Rendering")
        await expect(page.locator("#step")).to_have_text("3 / 20")
        assert await page.get_by_role("progressbar").evaluate("bar => bar.position") == 3 / 20
        await expect(page.locator(".caption")).to_have_text("preview 1")
        assert await shown(page.locator(".tile img")) == colour_of(partial_image(stub.specs[0], 0, 0).data)
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#status")).to_have_text("Cancelled")
    await expect(page.locator(".tile.unfinished")).to_have_count(1)


async def test_cancel(page: Page, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=60, slots=1):
        await ask(page, "a fox")
        await are(queue, waiting=0, running=1)
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#status")).to_have_text("Cancelled")
        await are(queue, waiting=0, running=0)
    await expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    await expect(page.locator(".tile")).to_have_count(0)
    await expect(page.locator(".error")).to_have_count(0)


async def test_the_position_in_the_queue(page: Page, queue: JobQueue, live_server: LiveServer) -> None:
    async with httpx.AsyncClient(base_url=live_server.url) as client, StubEngine(queue, step_s=60, slots=1):
        for _ in range(2):
            await client.post("/v1/images/generations", json={"prompt": "x"}, headers={"prefer": "respond-async"})
        await are(queue, waiting=1, running=1)
        await ask(page, "a fox")
        await expect(page.locator("#status")).to_have_text("Waiting: 1 ahead")
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#status")).to_have_text("Cancelled")
        await are(queue, waiting=1, running=1)


async def test_an_edit_of_a_result(page: Page, queue: JobQueue) -> None:
    async with StubEngine(queue) as stub:
        await make(page, "a fox", seed=5, size="128x64")
        await page.locator(".tile").get_by_role("button", name="Edit").click()
        await expect(page.locator("#sources li")).to_have_count(1)
        await expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
        extra = {
            "name": "blue.png",
            "mimeType": "image/png",
            "buffer": source_images.png(Image.new("RGB", (64, 64), "blue")),
        }
        await page.get_by_label("Add images to edit").set_input_files([extra, extra])  # type: ignore[list-item]
        await page.get_by_role("button", name="Remove image 3").click()
        await page.get_by_label("Prompt", exact=True).fill("a red fox")
        await page.locator("#submit").click()
        await expect(page.locator("#thumbs li")).to_have_count(2)
    spec, sources = stub.specs[1], stub.sources[1]
    assert sources is not None
    assert [colour_of(data) for data in sources.files] == [colour_of(stub_image(stub.specs[0], 5)), (0, 0, 255)]
    assert (spec.prompt, spec.seed, spec.width, spec.height, spec.partial_images) == ("a red fox", 5, 128, 64, 2)
    assert await shown(page.locator(".tile img")) == colour_of(stub_image(spec, 5, sources))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 11}, "n", "n takes a number of images, 1..10"),
        ({"seed": "many"}, "seed", "it should be a valid integer"),
        ({"size": "3x3"}, "size", "64..2048"),
    ],
)
async def test_an_error_is_shown_beside_its_field(
    page: Page, queue: JobQueue, fields: dict[str, Any], param: str, message: str
) -> None:
    async with StubEngine(queue):
        await ask(page, "a fox", **fields)
        await expect(page.locator(f".field:has(#{param}) .error")).to_contain_text(message)
        field = page.locator(f"#{param}")
        await expect(field).to_be_focused()
        await expect(field).to_have_attribute("aria-invalid", "true")
        await expect(field).to_have_accessible_error_message(await page.locator(".error").inner_text())
        await field.fill("")
        await page.keyboard.press("Enter")
        await expect(page.locator(".tile.done")).to_have_count(1)
        await expect(page.locator(".error, [aria-invalid]")).to_have_count(0)


async def test_errors_of_hidden_fields_of_no_field_and_of_the_engine(page: Page, queue: JobQueue) -> None:
    await ask(page, "a fox")
    await expect(page.locator("#problem .error")).to_have_text("No engine is running.")
    async with StubEngine(queue) as stub:
        await asyncio.sleep(CACHE_TTL_S)
        await page.get_by_text("More", exact=True).click()
        await page.get_by_label("Guidance").fill("99")
        await page.get_by_text("More", exact=True).click()
        await ask(page, "a fox")
        await expect(page.locator(".field:has(#guidance_scale) .error")).to_contain_text("0..20")
        await expect(page.get_by_label("Guidance")).to_be_focused()
        await page.get_by_label("Guidance").fill("")
        stub.failures = {
            "refused": JobError("Too long.", "invalid_request_error", "invalid_value", "prompt"),
            "broken": JobError("The engine cannot.", "server_error", "internal_error"),
        }
        await ask(page, "refused")
        await expect(page.locator(".field:has(#prompt) .error")).to_have_text("Too long.")
        await ask(page, "broken")
        await expect(page.locator("#problem .error")).to_have_text("The engine cannot.")
        await ask(page, " ")
        await expect(page.locator(".field:has(#prompt) .error")).to_have_text("The field prompt is required.")
        await page.get_by_label("Add images to edit").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": b"not an image"}
        )
        await page.get_by_label("Prompt", exact=True).fill("a fox")
        await page.locator("#submit").click()
        await expect(page.locator(".field:has(#image) .error")).to_be_visible()


async def test_a_server_with_keys_requires_one(browser: Browser, queue: JobQueue) -> None:
    server = LiveServer(queue, ServerSettings(api_key="right"))  # type: ignore[arg-type]
    async with StubEngine(queue), open_page(browser, server.url) as page:
        key = page.get_by_label("API key")
        await expect(key).to_be_visible()
        await ask(page, "a fox")
        await expect(page.locator("#key-field .error")).to_be_visible()
        await expect(key).to_be_focused()
        await key.fill("wröng")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-field .error")).to_contain_text("ASCII")
        await key.fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-field .error")).to_contain_text("key")
        await key.fill("right")
        await page.keyboard.press("Enter")
        await expect(page.locator(".tile.done")).to_have_count(1)
        await page.reload()
        await expect(key).to_have_value("right")
        assert await page.evaluate("Object.keys(localStorage)") == []
    await server.stop()


async def test_keyboard_only(page: Page, queue: JobQueue) -> None:
    press, write = page.keyboard.press, page.keyboard.type

    async def tab_to(target: Locator) -> None:
        for _ in range(40):
            await press("Tab")
            if await target.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"no way to {target} by Tab")

    async with StubEngine(queue) as stub:
        await tab_to(page.get_by_label("Prompt", exact=True))
        await write("a poster")
        await tab_to(page.get_by_role("button", name="+ top headline"))
        await press("Enter")
        await write("SALE")
        await tab_to(page.get_by_role("button", name="+ center"))
        await press("Space")
        await write("a ring")
        await press("Control+Enter")
        await expect(page.locator(".tile.done")).to_have_count(1)
        assert stub.specs[0].prompt == 'a poster, top headline "SALE", center a ring'
        await tab_to(page.locator(".tile .plan"))
        await press("Enter")
        await expect(page.locator(".tile .plan")).to_have_attribute("aria-pressed", "true")
        details = page.locator(".tile").get_by_role("button", name="Details")
        await tab_to(details)
        await press("Enter")
        await expect(page.get_by_role("dialog")).to_be_visible()
        await press("Escape")
        await expect(page.get_by_role("dialog")).to_be_hidden()
        await expect(details).to_be_focused()
        await tab_to(page.locator("#thumbs button").first)
        await press("Delete")
        await expect(page.locator("#history")).to_be_hidden()
        await expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


async def test_the_history_survives_a_reload(page: Page, queue: JobQueue, tmp_path: Path) -> None:
    async with StubEngine(queue) as stub:
        await make(page, "a fox", seed=5, n=2, num_inference_steps=4)
        await page.reload()
        thumbs = page.locator("#thumbs button")
        await expect(thumbs).to_have_count(2)
        await thumbs.first.click()  # the newest
        await expect(page.locator("#viewer-prompt")).to_have_text("a fox")
        assert await shown(page.locator("#viewer img")) == colour_of(stub_image(stub.specs[0], 6))
        async with page.expect_download() as download:
            await page.get_by_role("dialog").get_by_role("link", name="Save").click()
        saved = await download.value
        assert saved.suggested_filename == "glimmer-6.png"
        await saved.save_as(tmp_path / "saved.png")
        assert (tmp_path / "saved.png").read_bytes() == stub_image(stub.specs[0], 6)
        await page.get_by_role("button", name="Reuse settings").click()
        await expect(page.locator("#seed")).to_have_value("6")
        await page.get_by_role("button", name="Generate", exact=True).click()
        await expect(thumbs).to_have_count(3)
        assert stub.specs[1] == replace(stub.specs[0], n=1, seed=6)
        await thumbs.first.click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await expect(thumbs).to_have_count(2)
        page.once("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
        await page.get_by_role("button", name="Delete all").click()
        await expect(page.locator("#history")).to_be_hidden()
        await page.reload()
        await expect(page.locator("#history")).to_be_hidden()


async def test_the_history_has_a_limit(page: Page, queue: JobQueue) -> None:
    async with StubEngine(queue):
        for round_number in range(6):
            await ask(page, "a fox", n=9, seed=100 * round_number)
            last = page.get_by_role("button", name=f"a fox, seed {100 * round_number + 8}")
            await expect(last).to_have_count(1)
        await expect(page.locator("#thumbs button")).to_have_count(50)
        await expect(page.get_by_role("button", name="a fox, seed 3", exact=True)).to_have_count(0)


async def test_a_reload_continues_with_the_job(page: Page, queue: JobQueue) -> None:
    async with HaltingEngine(queue) as stub:
        await ask(page, "a fox", seed=5)
        await expect(page.locator("#step")).to_have_text("3 / 20")
        await page.reload()
        await expect(page.locator("#step")).to_have_text("3 / 20")
        await expect(page.locator(".caption")).to_have_text("preview 1")
        stub.may_go_on.set()
        await expect(page.locator(".tile.done")).to_have_count(1)
        await expect(page.locator("#thumbs li")).to_have_count(1)
        assert await shown(page.locator(".tile img")) == colour_of(stub_image(stub.specs[0], 5))


async def test_a_broken_connection_is_resumed(page: Page, queue: JobQueue) -> None:
    breaks = iter((True, True))

    async def once_broken(route: Any) -> None:
        await (route.abort() if next(breaks, False) else route.continue_())

    await page.route("**/events", once_broken)
    async with StubEngine(queue) as stub:
        await make(page, "a fox", seed=5)
    assert len(stub.specs) == 1
    assert next(breaks, None) is None


AWKWARD = """it's "A\\B" $HOME `x` %s ü\nline two"""


async def copied(page: Page, name: str) -> str:
    await page.get_by_role("button", name=name).first.click()
    await expect(page.get_by_role("button", name="Copied")).to_have_count(1)
    return await page.evaluate("navigator.clipboard.readText()")


async def test_copied_code_runs(browser: Browser, queue: JobQueue, live_server: LiveServer, tmp_path: Path) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    async with StubEngine(queue) as stub, open_page(browser, live_server.url, permissions=permissions) as page:
        await make(page, AWKWARD, seed=5, size="96x64", num_inference_steps=3)
        await run_python(await copied(page, "Copy as Python"), tmp_path)
        assert (tmp_path / "image-1.png").read_bytes() == stub_image(stub.specs[0], 5)
        await run_curl(await copied(page, "Copy as curl"), tmp_path)
        original = replace(stub.specs[0], partial_images=0, return_plan=False)
        assert stub.specs[1:] == [original, original]

        (tmp_path / "source-1.png").write_bytes(stub_image(stub.specs[0], 5))
        await page.locator(".tile").get_by_role("button", name="Edit").click()
        await run_python(await copied(page, "Copy as Python"), tmp_path)
        await run_curl(await copied(page, "Copy as curl"), tmp_path)
        assert [spec.prompt for spec in stub.specs] == [AWKWARD] * 5
        for sources in stub.sources[3:]:
            assert sources is not None
            assert [colour_of(data) for data in sources.files] == [colour_of(stub_image(stub.specs[0], 5))]


async def run_python(code: str, folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=folder, stderr=asyncio.subprocess.PIPE, env={**os.environ, "NO_PROXY": "*"}
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def run_curl(command: str, folder: Path) -> None:
    """Do what the command does, without curl."""
    lines = command.partition(" \\\n  | jq ")[0]
    words = shlex.split(lines.replace(" \\\n  --", " --"))  # shlex does not join continued lines
    assert words[:2] == ["curl", "--fail-with-body"]
    url, *options = words[2:]
    headers: dict[str, str] = {}
    texts: dict[str, str] = {}
    files: list[tuple[str, tuple[str, bytes]]] = []
    content = None
    for option, value in zip(options[::2], options[1::2], strict=True):
        name, _, rest = value.partition("=")
        if option == "--header":
            header, _, said = value.partition(": ")
            headers[header] = said
        elif option == "--data-raw":
            content = value
            assert json.loads(value)["response_format"] == "b64_json"
        elif option == "--form-string":
            texts[name] = rest
        else:
            assert (option, rest[0]) == ("--form", "@")
            files.append((name, (rest[1:], (folder / rest[1:]).read_bytes())))
    async with httpx.AsyncClient() as client:
        if content is None:
            response = await client.post(url, headers=headers, data=texts, files=files)
        else:
            response = await client.post(url, headers=headers, content=content.encode())
    assert response.status_code == 200, response.text


VIEWPORTS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", VIEWPORTS)
async def test_the_page_fits_the_screen(
    browser: Browser,
    queue: JobQueue,
    live_server: LiveServer,
    tmp_path: Path,
    device: str,
    scheme: Literal["light", "dark"],
) -> None:
    """The page is never wider than the screen. Screenshots are kept in pytest's folder."""

    async def look(page: Page, state: str) -> None:
        await page.wait_for_timeout(300)
        await page.screenshot(path=tmp_path / f"{state}.png", full_page=True)
        width = await page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= VIEWPORTS[device]["width"], f"{state} is {width} pixels wide"
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        channels = [int(channel) for channel in background.removeprefix("rgb(").removesuffix(")").split(",")]
        assert (sum(channels) < 3 * 128) == (scheme == "dark")

    options: dict[str, Any] = {"viewport": VIEWPORTS[device], "color_scheme": scheme, "has_touch": device == "phone"}
    long = "a poster of " + "extraordinarily" * 12
    async with open_page(browser, live_server.url, **options) as page:
        await look(page, "empty")
        async with HaltingEngine(queue) as engine:
            await ask(page, long, size="512x256", n=2)
            await expect(page.locator(".tile[data-partials='1']")).to_have_count(2)
            await expect(page.locator("#step")).to_have_text("3 / 20")
            await look(page, "running")
            engine.may_go_on.set()
            await expect(page.locator("#thumbs li")).to_have_count(2)
        async with StubEngine(queue):
            await make(page, long, size="64x256", n=5)
            await look(page, "several")
            await make(page, "a blue poster", size="512x512", n=1)
            await page.locator(".tile .plan").click()
            await look(page, "plan")
            await page.locator(".tile").get_by_role("button", name="Edit").click()
            await page.get_by_text("More", exact=True).click()
            await page.get_by_label("Top p").fill("2")
            await page.locator("#submit").click()
            await expect(page.locator(".error")).to_have_count(1)
            await look(page, "error")
            await page.locator("#thumbs button").last.click()
            await look(page, "details")


def test_stub_images_differ() -> None:
    """The tests above compare images by colour."""
    spec = JobSpec("a fox", 64, 64, seed=5)
    colours = {colour_of(data) for data in (stub_image(spec, 5), stub_image(spec, 6), partial_image(spec, 0, 0).data)}
    assert len(colours) == 3
