"""Decode processes: what a file does to one of them, and what that costs others."""

import asyncio
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admission.turns import Turns
from server.errors import ApiError
from server.image_files import decoders as module
from server.image_files.decoders import Decoders
from server.image_files.edit_input import EditFiles
from tests.server.image_files import file_of, many_chunks, opened, patterned
from tests.waiting import until

ODD = (sys.executable, "-m", "tests.server.odd_decode_worker")
IMAGE = file_of(patterned())


def files(data: bytes = IMAGE) -> EditFiles:
    return EditFiles([data], None, None, 2048 * 2048)


@pytest.fixture
async def decoders() -> AsyncIterator[Decoders]:
    async with aclosing(Decoders()) as opened_decoders:
        yield opened_decoders


@pytest.fixture
async def odd() -> AsyncIterator[Decoders]:
    async with aclosing(Decoders(ODD)) as opened_decoders:
        yield opened_decoders


async def refusal(decoders: Decoders, data: bytes, owner: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        await decoders.decode(owner, files(data))
    return caught.value


def children() -> set[int]:
    """Return the live processes that this one started."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in task.read_text().split()}


async def test_a_process_decodes_one_edit_after_the_other(decoders: Decoders) -> None:
    before = children()
    for _ in range(3):
        edit = await decoders.decode("", files())
        assert opened(edit.source_images.files[0]).tobytes() == patterned().tobytes()
    assert (await refusal(decoders, IMAGE[:60])).message.startswith("The image cannot be read")
    assert len(children() - before) == 1
    await decoders.aclose()
    assert children() == before


def test_decode_processes_do_not_load_the_api() -> None:
    script = "import sys, server.image_files.decode_worker; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"fastapi", "starlette", "pydantic", "redis", "numpy", "torch"} & set(ran.stdout.split())


@pytest.mark.parametrize(
    ("order", "status", "message"),
    [
        (b"spin", 400, "Image 1 takes too long to decode"),
        (b"sleep", 400, "Image 1 takes too long to decode"),
        (b"allocate", 400, "Image 1 takes too much memory"),
        (b"crash", 400, "Image 1 cannot be read"),
        (b"raise", 400, "Image 1 cannot be read"),
    ],
)
async def test_what_a_file_does_to_its_decoder_is_its_own_error(
    odd: Decoders, monkeypatch: pytest.MonkeyPatch, order: bytes, status: int, message: str
) -> None:
    if order == b"sleep":
        monkeypatch.setattr(module, "DECODE_TIMEOUT_S", 1.0)
    beside = asyncio.create_task(odd.decode("bob", files()))
    error = await refusal(odd, order, "alice")
    assert (error.status, error.message.startswith(message)) == (status, True), error.message
    await beside
    monkeypatch.undo()
    await odd.decode("alice", files())


async def test_a_process_that_is_killed_from_outside_says_nothing_about_the_image(odd: Decoders) -> None:
    before = children()
    await odd.decode("", files())
    (idle,) = children() - before
    os.kill(idle, signal.SIGKILL)
    await odd.decode("", files())
    running = asyncio.create_task(refusal(odd, b"sleep"))
    await until(lambda: odd._busy and all(worker.file for worker in odd._busy))
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    assert (await running).status == 503
    await odd.decode("", files())


async def test_a_client_that_leaves_gives_up_its_place(odd: Decoders) -> None:
    before = children()
    tasks = [asyncio.create_task(odd.decode("alice", files(b"sleep"))) for _ in range(5)]
    await until(lambda: len(odd._busy) == module.PLACES_PER_CALLER)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await odd.decode("alice", files())
    await odd.aclose()
    assert children() == before


async def test_one_caller_leaves_a_place_for_the_others(odd: Decoders) -> None:
    hostile = [asyncio.create_task(odd.decode("mallory", files(b"sleep"))) for _ in range(20)]
    await until(lambda: len(odd._busy) == module.PLACES_PER_CALLER)
    await asyncio.gather(*(odd.decode(owner, files()) for owner in ("alice", "bob", "alice")))
    assert not any(task.done() for task in hostile)
    for task in hostile:
        task.cancel()
    await asyncio.wait(hostile)


async def test_waiting_for_a_place_ends(odd: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN_TIMEOUT_S", 0.2)
    hostile = [asyncio.create_task(odd.decode("", files(b"sleep"))) for _ in range(module.PLACES_PER_CALLER)]
    await until(lambda: len(odd._busy) == module.PLACES_PER_CALLER)
    started: list[str] = []
    with pytest.raises(ApiError, match="wait to be decoded") as caught:
        await odd.decode("", files(), on_start=lambda: started.append("late"))
    assert (caught.value.status, started) == (503, [])
    for task in hostile:
        task.cancel()
    await asyncio.wait(hostile)


async def test_small_files_of_many_parts_cost_others_nothing(decoders: Decoders) -> None:
    """Ten files of 330,000 chunks took seconds each; now all are refused while the honest edit is decoded."""
    hostile = [asyncio.create_task(refusal(decoders, many_chunks(b"tEXt", 330_000), "mallory")) for _ in range(10)]
    await decoders.decode("alice", files(file_of(patterned(512, 512))))
    errors = await asyncio.gather(*hostile)
    assert all("more than 100000 chunks" in error.message for error in errors)


PARENT = """
import asyncio, os
from server.image_files.decoders import Decoders
from server.image_files.edit_input import EditFiles
import tests.server.test_decoders as t

async def main():
    decoders = Decoders(t.ODD)
    orders = (b"sleep", b"spin")
    tasks = [asyncio.create_task(decoders.decode(str(order), EditFiles([order], None, None, 1))) for order in orders]
    await t.until(lambda: len(decoders._busy) == 2 and all(worker.file for worker in decoders._busy))
    print(*t.children(), flush=True)
    await asyncio.gather(*tasks)

asyncio.run(main())
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_decode_processes_end_with_the_api(sig: signal.Signals) -> None:
    """Also when it is killed, and silently: a terminal sends Ctrl+C to every process of its group."""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 2
    os.killpg(parent.pid, sig)
    _, errors = await parent.communicate()
    await until(lambda: not any(_is_alive(pid) for pid in pids))
    assert b"decode_worker" not in errors


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestTurns:
    @given(
        places=st.integers(1, 4),
        per_caller=st.integers(1, 4),
        steps=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["come", "leave", "end"])), max_size=40),
    )
    def test_in_any_order(self, places: int, per_caller: int, steps: list[tuple[str, str]]) -> None:
        """No place stays free while a caller may have it, none is taken twice, and all come back."""

        async def play() -> None:
            turns, inside, tasks = Turns(places, per_caller), Counter[str](), []

            async def work(owner: str, finish: asyncio.Event) -> None:
                async with turns.take(owner):
                    inside[owner] += 1
                    try:
                        await finish.wait()
                    finally:
                        inside[owner] -= 1

            for owner, step in steps:
                mine = [task for task in tasks if task[0] == owner and not task[1].done()]
                if step == "come":
                    finish = asyncio.Event()
                    tasks.append((owner, asyncio.create_task(work(owner, finish)), finish))
                elif mine and step == "leave":
                    mine[len(mine) // 2][1].cancel()
                elif mine:
                    mine[0][2].set()
                for _ in range(len(owner) * (len(tasks) % 3)):  # sometimes several things happen at once
                    await asyncio.sleep(0)
                assert sum(inside.values()) <= places
                assert all(count <= per_caller for count in inside.values())
            for _ in range(5):
                await asyncio.sleep(0)
            waiting = Counter(owner for owner, task, _ in tasks if not task.done()) - inside
            if sum(inside.values()) < places:
                assert all(inside[owner] == per_caller for owner in waiting)
            for _, _, finish in tasks:
                finish.set()
            for _ in range(5 * len(tasks)):
                await asyncio.sleep(0)
            for _, task, _ in tasks:
                assert task.done()
                with suppress(asyncio.CancelledError):
                    await task
            assert turns._free == places
            assert not turns._taken
            assert not turns._lines

        asyncio.run(play())

    async def test_lines_take_turns(self) -> None:
        turns, order = Turns(1, 1), []

        async def work(owner: str) -> None:
            async with turns.take(owner):
                order.append(owner)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(owner) for owner in "aaaabbc"))
        assert order == [*"aabcaba"]
