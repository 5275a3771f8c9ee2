"""Any body takes time and memory in proportion to its size, at most a few times those of a harmless one."""

import asyncio
import functools
import gc
import re
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.admission import memory_budget
from server.errors import ApiError
from server.requests.body import read_generation
from server.requests.schemas import EditRequest
from server.requests.uploads import read_edit
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.incoming import ReadBody, read_body
from tests.server.stub_engine import StubEngine
from tests.server.test_edits import IMAGE
from tests.server.test_errors import error_of
from tests.server.test_keys import bearer, table
from tests.waiting import until

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SIZE = 4_000_000
CHUNK = 64 * 1024
JSON, FORM = "application/json", "multipart/form-data; boundary=B"
FEW = settings(max_examples=12, deadline=None, database=None)


class Body(bytes):
    """A body whose repr is short."""

    def __repr__(self) -> str:
        return f"{self[:120]!s}... ({len(self)} bytes)"


# --- one body, read without a server ----------------------------------------------------------------------------------


def read(body: bytes, content_type: str) -> list[ApiError | None]:
    """Read the body of an edit, and if it is JSON of a generation; return the errors they are refused with."""
    readers = (read_edit, read_generation) if content_type == JSON else (read_edit,)
    return [asyncio.run(_read(reader, body, content_type)) for reader in readers]


async def _read(reader: ReadBody, body: bytes, content_type: str) -> ApiError | None:
    try:
        await read_body(reader, body, content_type, CHUNK, 2 * SIZE)
    except ApiError as error:
        return error
    return None


def cost(body: bytes, content_type: str) -> tuple[float, int]:
    """Return the CPU seconds of this thread and the bytes by which the process grew at most; errors must be short."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, started = _status("VmRSS"), time.thread_time()
    errors = read(body, content_type)
    result = time.thread_time() - started, _status("VmHWM") - before
    assert all(error is None or len(error.message) + len(error.param or "") < 500 for error in errors)
    return result


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def part(name: bytes, data: bytes, more: bytes = b"") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + data + b"\r\n"


FILE = b'; filename="a"'
TOKENS = b"".join(part(b"plan[tokens][]", b"1") for _ in range(4352))
HARMLESS = {
    JSON: b'{"prompt": "x", "image": "data:image/png;base64,' + b"A" * (SIZE - 100) + b'"}',
    # As the official SDK sends a plan.
    FORM: part(b"prompt", b"x") + TOKENS + part(b"image", bytes(SIZE - len(TOKENS) - 200), FILE) + b"--B--",
}


@functools.cache
def harmless_seconds(content_type: str) -> float:
    return min(cost(HARMLESS[content_type], content_type)[0] for _ in range(3))


def check(body: bytes, content_type: str) -> None:
    assert len(body) <= SIZE + 1000
    allowed = 15 * harmless_seconds(content_type)
    seconds, grown = cost(body, content_type)
    assert grown < 10 * SIZE
    # Once more: another process may have taken the caches.
    assert min(seconds, cost(body, content_type)[0] if seconds > allowed else seconds) < allowed


# --- JSON -------------------------------------------------------------------------------------------------------------

VALUES = [b"1", b"1.0", b"{}", b"[]", b'""', b"true", b'{"a":1}', b"[[]]", rb'"\ud800"', b"-111111111111111111111"]
TEXTS = [b"a", rb"\u0041", rb"\"", "é".encode(), "😀".encode(), rb"\ud800", rb"\ud83d\ude00", b" ", b"\xff", b"="]
FIELDS = [name.encode() for name in ("unknown", "svg", *EditRequest.model_fields)]
PREFIXES = [b"", b"data:image/png;base64,", b"data:", b"A", "😀".encode()]


def filled(unit: bytes, room: int, separator: bytes = b"") -> bytes:
    return separator.join([unit] * (room // (len(unit) + len(separator))))


@st.composite
def json_bodies(draw: st.DrawFn) -> bytes:
    """Return a body whose size is in one place: a list, an object, a string, a name, a number, nesting or blanks."""
    field, limit = draw(st.sampled_from(FIELDS)), draw(st.sampled_from([10_000, 99_000, SIZE]))
    kind = draw(st.sampled_from(["list", "names", "text", "name", "number", "nested", "blank", "tokens", "repeated"]))
    value = draw(st.sampled_from(VALUES))
    room = min(SIZE - 200, limit * (len(value) + 1))
    text = draw(st.sampled_from(PREFIXES)) + filled(draw(st.sampled_from(TEXTS)), SIZE - 200)
    values = b"[" + filled(value, room, b",") + b"]"
    extra = {
        "list": lambda: b'"%b":%b' % (field, values),
        "names": lambda: b",".join(b'"%b%x":%b' % (field, i, value) for i in range(min(limit, room // 40))),
        "text": lambda: b'"%b":"%b"' % (field, text),
        "name": lambda: b'"%b":%b' % (text, value),
        "number": lambda: b'"%b":%b' % (field, draw(st.sampled_from([b"", b"-", b"1.", b"1e", b"1e-"])) + b"1" * SIZE),
        "nested": lambda: b'"%b":[%b]' % (field, filled(b"[" * 900 + b"]" * 900, SIZE - 200, b",")),
        "blank": lambda: b'"%b":%b1' % (field, b" " * (SIZE - 200)),
        "tokens": lambda: b'"plan":{"rows":1,"cols":1,"tokens":%b}' % values,
        "repeated": lambda: filled(b'"%b":%b' % (field, value), room // 8, b","),
    }[kind]()
    prompt = draw(st.sampled_from([b'"prompt":"x",', rb'"prompt":"\ud800",', b""]))
    return Body(b"{" + prompt + extra + draw(st.sampled_from([b"}", b""])))


@FEW
@example(Body(b'{"prompt":"x","images":[' + b"1," * (SIZE // 2 - 20) + b"1]}"))
@example(Body(b'{"prompt":"x"' + b"".join(b',"%x":1' % i for i in range(SIZE // 12)) + b"}"))
@example(Body(b'{"prompt":"x","' + b"ab" * (SIZE // 2) + b'":1}'))
@example(Body(rb'{"prompt":"\ud800","extra_headers":{"a":[' + b"{}," * (SIZE // 3 - 20) + b"1]}}"))
@example(Body(rb'{"prompt":"\ud800","extra_headers":{"a":[' + b"{}," * 49_000 + b"1]}}"))
@given(json_bodies())
def test_any_json(body: bytes) -> None:
    check(body, JSON)


# --- forms ------------------------------------------------------------------------------------------------------------

PIECES = [b"\r", b"\n", b"\r\n", b"-", b"\r\n--", b" ", b";", b'";', rb"\";", b"a", b"\0", b":", b"a:b\r\n"]
PIECES += [b"\r\n--B" + end for end in (b"x", b"-x", b"\rx", b" \r")]


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Return a form with adversarial bytes in one place of one part, or of each of many parts."""
    piece = draw(st.sampled_from(PIECES))
    count = draw(st.sampled_from([1, 100, 10_000, 100_000]))
    filler = filled(piece, min(draw(st.sampled_from([8, 1000, 4000, SIZE])), SIZE // count - 100))
    name = draw(st.sampled_from([b"image", b"prompt", b"plan", b"plan[tokens][]", b"unknown"]))
    unit = draw(
        st.sampled_from(
            [
                part(name, filler),
                part(name, filler, FILE),
                part(name, b"x", b";" + filler),
                part(name, b"x", b"\r\n" + filler),
                part(filler, b"x"),
                part(name, b"x")[:-2] + b"\r\n--B" + filler + b"\r\n",
                filler,
            ]
        )
    )
    return Body((unit * count)[: SIZE - 100] + draw(st.sampled_from([b"--B--\r\n", b"\r\n--B--", b""])))


def in_each_part(data: bytes = b"1", more: bytes = b"", count: int = 10_000) -> bytes:
    unit = part(b"plan[tokens][]", data, more)
    return unit * min(count, (SIZE - 100) // len(unit)) + b"--B--"


@FEW
@example(Body(part(b"prompt", b"x")[:-2] + b"\r\n--B" + b" " * (SIZE - 100)))
@example(Body(in_each_part(more=b";" * 3900)))
@example(Body(in_each_part(more=b"\r\na:b" * 7)))
@example(Body(in_each_part(more=b"\r\na:" + b"b" * 4000)))
@example(Body(in_each_part(data=b"1\r\n--B" + b" " * 700)))
@example(Body(part(b"plan", b'{"tokens":[' + b"1," * 500_000)))
@example(Body(part(b"image", b"data:image/png;base64," + b"A" * (SIZE - 200)) + part(b"prompt", b"x") + b"--B--"))
@given(forms())
def test_any_form(body: bytes) -> None:
    check(body, FORM)


# --- what a request holds ---------------------------------------------------------------------------------------------


async def pieces_of(*parts: bytes | int) -> AsyncIterator[bytes]:
    """Yield a body that is held nowhere as a whole; a number stands for as many bytes."""
    for data in parts:
        if isinstance(data, bytes):
            yield data
        else:
            for _ in range(data // CHUNK):
                yield BLANKS
                await asyncio.sleep(0)


BLANKS = b" " * CHUNK


async def inflight(client: httpx.AsyncClient) -> float:
    match = re.search(r"^glimmer_api_inflight_bytes (\S+)", (await client.get("/metrics")).text, re.MULTILINE)
    assert match
    return float(match[1])


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "once"}])
@pytest.mark.parametrize(
    ("url", "content_type", "head", "tail"),
    [
        (GENERATIONS, JSON, b'{"prompt": "x", "extra_headers": {"a": "', b'"}}'),
        (EDITS, FORM, part(b"prompt", b"x") + part(b"image", IMAGE, FILE)[:-2], b"\r\n--B--"),
    ],
)
async def test_a_waiting_request_holds_no_body(
    make_client: MakeClient,
    queue: JobQueue,
    url: str,
    content_type: str,
    head: bytes,
    tail: bytes,
    headers: dict[str, str],
) -> None:
    await queue.heartbeat(StubEngine(queue).info, "", 60)  # of an engine that claims nothing
    size, headers = 4 * 2**20, {"content-type": content_type, **headers}
    async with make_client(max_body_bytes=2 * size) as client:

        async def post() -> httpx.Response:
            return await client.post(url, content=pieces_of(head, size, tail), headers=headers)

        gc.disable()  # nothing may wait for a collection
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            requests = [asyncio.create_task(post()) for _ in range(3)]
            jobs = 1 if "idempotency-key" in headers else 3
            await until(lambda: _waiting(queue, jobs))
            await until(lambda: _is_zero(client))
            assert tracemalloc.get_traced_memory()[0] - before < size
            assert tracemalloc.get_traced_memory()[1] - before > size
        finally:
            tracemalloc.stop()
            gc.enable()
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


async def _waiting(queue: JobQueue, jobs: int) -> bool:
    return (await queue.stats()).waiting == jobs


async def _is_zero(client: httpx.AsyncClient) -> bool:
    return await inflight(client) == 0


@pytest.mark.parametrize("declares", [True, False])
async def test_bodies_that_arrive_are_counted(make_client: MakeClient, stub: StubEngine, declares: bool) -> None:
    finish = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"prompt": "x"' + b" " * 60_000
        await finish.wait()
        yield b"}"

    headers = {"content-type": JSON, **({"content-length": "60015"} if declares else {})}
    async with make_client(max_inflight_bytes=100_000) as client:
        first = asyncio.create_task(client.post(GENERATIONS, content=stalled(), headers=headers))

        async def is_counted() -> bool:
            return await inflight(client) >= 60_014

        await until(is_counted)
        refused = await client.post(GENERATIONS, json={"prompt": "x", "user": "x" * 50_000})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "service_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.post(GENERATIONS, json={"prompt": "x"})).status_code == 200
        finish.set()
        assert (await first).status_code == 200
        assert await inflight(client) == 0


@pytest.mark.parametrize("gives_way_s", [0.0, 1000.0])
async def test_what_is_declared_and_does_not_arrive_takes_nothing_from_others(
    make_client: MakeClient, stub: StubEngine, monkeypatch: pytest.MonkeyPatch, gives_way_s: float
) -> None:
    """Uploads of 32 MiB that stall at their begin: generations are served; without room the stalled give way."""
    monkeypatch.setattr(memory_budget, "GIVES_WAY_S", gives_way_s)
    finish, begun = asyncio.Event(), 0

    async def stalled() -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        yield b"--B"
        await finish.wait()

    maximum = 2**20 if gives_way_s == 0 else 2**25
    headers = {"content-type": FORM, "content-length": str(2**25)}
    async with make_client(max_inflight_bytes=maximum) as client:
        uploads = [asyncio.create_task(client.post(EDITS, content=stalled(), headers=headers)) for _ in range(16)]
        await until(lambda: begun == 16)
        for _ in range(4):
            assert (await client.post(GENERATIONS, json={"prompt": "x"})).status_code == 200
        if gives_way_s == 0:
            assert (await client.post(GENERATIONS, json={"prompt": "x" + " " * 900_000})).status_code != 503
            await until(lambda: sum(upload.done() for upload in uploads) >= 8)
            assert {upload.result().status_code for upload in uploads if upload.done()} == {503}
        finish.set()
        await asyncio.gather(*uploads)
        assert await inflight(client) == 0


async def test_a_key_has_half_of_the_memory(make_client: MakeClient, stub: StubEngine, tmp_path: Path) -> None:
    keys, finish = tmp_path / "keys.toml", asyncio.Event()
    keys.write_text(table("alice", "a") + table("bob", "b"))

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"prompt": "x"' + b" " * 40_000
        await finish.wait()
        yield b"}"

    large = {"prompt": "x", "user": "x" * 20_000}
    async with make_client(max_inflight_bytes=100_000, api_keys_file=keys) as client:
        first = asyncio.create_task(
            client.post(GENERATIONS, content=stalled(), headers={"content-type": JSON, **bearer("a")})
        )

        async def is_counted() -> bool:
            return await inflight(client) >= 40_000

        await until(is_counted)
        refused = await client.post(GENERATIONS, json=large, headers=bearer("a"))
        assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.post(GENERATIONS, json=large, headers=bearer("b"))).status_code == 200
        finish.set()
        assert (await first).status_code == 200
