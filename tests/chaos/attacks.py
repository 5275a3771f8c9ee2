"""Honest clients beside attackers, who have a key as well."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from server.admission.keys import hash_key
from tests.chaos import usage
from tests.chaos.attackers import Tally, Target, send_hostile_requests
from tests.chaos.attackers import slow_clients as open_slow_clients
from tests.chaos.cases import Cases, Kind
from tests.chaos.ledger import quantile
from tests.chaos.processes import FORKS, StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, open_scene
from tests.chaos.sizes import Sizes
from tests.chaos.stub import NOISE, die_with_parent
from tests.chaos.usage import MIB
from tests.waiting import until

HONEST, HOSTILE = "honest-key", "hostile-key"
WORK: dict[Kind, int] = {"plain": 4, "stream": 2, "edit": 1}
MAX_SLOWDOWN = 2.0
MAX_GROWTH = 384 * MIB  # one and a half times what requests and responses may take
MAX_KEPT = 64 * MIB
MAX_FILES_KEPT = 8  # pipes of decode processes
SETTLE_S = 1.0
BACK_S = 20.0


@dataclass
class Siege:
    """Figures of honest clients and of the API.

    Args:
        undisturbed, beside: seconds of each image, sorted.
        memory: before and at most, in bytes.
        files: descriptors before.
    """

    tally: Tally
    undisturbed: list[float]
    beside: list[float]
    memory: tuple[int, int]
    files: int


def _settings(folder: Path) -> StackSettings:
    """Return settings with a key for either side."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = folder / "keys.toml"
    keys.write_text(
        f'[honest]\nsha256 = "{hash_key(HONEST).hex()}"\n[hostile]\nsha256 = "{hash_key(HOSTILE).hex()}"\n'
        "max_concurrent = 4\n"
    )
    return StackSettings(api_options={"api-keys": keys}, key=HONEST)


async def slow_clients(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Open connections that send or read nothing, or stop just before the end."""
    async with open_scene("slow clients", folder, seed, _settings(folder)) as scene:
        answer = await _large_answer(scene)
        attack = partial(open_slow_clients, _target(scene), answer, sizes.connections, sizes.attack_s)
        siege = await _besiege(scene, seed, sizes, attack)
        tally = siege.tally
        await _judge(scene, siege)
        for kind, count in tally.opened.items():
            scene.report.note(f"{kind}: connections, open for max s", f"{count}, {tally.open_for[kind]:.0f}")
        readers = {status: count for (kind, status), count in tally.responses.items() if kind == "slow reader"}
        scene.report.note("responses to slow readers", readers)
        left = [f"{count} x {kind}" for kind, count in tally.left.items()]
        scene.report.check_none("of these never ended or served in full", left)
    return scene.report.figures


async def hostile(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Send hostile bodies, files and heads in a loop."""
    async with open_scene("hostile requests", folder, seed, _settings(folder)) as scene:
        attack = partial(send_hostile_requests, _target(scene), sizes.hostile_clients, seed, sizes.attack_s)
        siege = await _besiege(scene, seed, sizes, attack)
        tally = siege.tally
        await _judge(scene, siege)
        slowest = max(tally.open_for, key=lambda name: tally.open_for[name])
        scene.report.note("hostile requests", f"{tally.opened.total()} of {len(tally.opened)} shapes")
        scene.report.note("slowest of them", f"{slowest}: {tally.open_for[slowest]:.1f} s")
        statuses = {status for _, status in tally.responses}
        counts = {status: sum(n for (_, s), n in tally.responses.items() if s == status) for status in statuses}
        scene.report.note("responses", ", ".join(f"{count} x {status}" for status, count in sorted(counts.items())))
        wrong = {f"{name}: {status}" for name, status in tally.responses if status in ("500", "none")}
        scene.report.check_none("errors and missing responses", wrong)
    return scene.report.figures


def _target(scene: Scene) -> Target:
    url = urlsplit(scene.stack.urls[0])
    assert url.hostname
    assert url.port
    return Target(url.hostname, url.port, HOSTILE)


async def _large_answer(scene: Scene) -> str:
    """Return the path of a finished job of the attackers, whose response has 12 MB."""
    body = {"prompt": NOISE, "size": "1024x1024", "n": 3, "num_inference_steps": 1}
    headers = {"authorization": f"Bearer {HOSTILE}", "prefer": "respond-async"}
    async with httpx.AsyncClient(base_url=scene.stack.urls[0], headers=headers, trust_env=False) as http:
        job = (await http.post("/v1/images/generations", json=body)).raise_for_status().json()
        path = f"/v1/jobs/{job['id']}"

        async def has_ended() -> bool:
            return (await http.get(path)).json()["status"] == "succeeded"

        await until(has_ended, 60.0)
    return path


async def _besiege(scene: Scene, seed: int, sizes: Sizes, attack: Callable[[], Tally]) -> Siege:
    """Run honest clients without, then with attackers."""
    loop, pid = asyncio.get_running_loop(), scene.stack.apis[0].pid
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=die_with_parent) as process:
        await loop.run_in_executor(process, int)  # it runs
        async with scene.load(iter(Cases(seed, WORK)), sizes.concurrency):
            await asyncio.sleep(SETTLE_S)
            undisturbed = await _latencies(scene, sizes.attack_s)
            memory, files = usage.memory(pid), usage.descriptors(pid)
            attacking = loop.run_in_executor(process, attack)
            beside = await _latencies(scene, sizes.attack_s)
        tally = await attacking
    return Siege(tally, undisturbed, beside, (memory, usage.memory(pid, "VmHWM")), files)


async def _latencies(scene: Scene, seconds: float) -> list[float]:
    """Return the seconds of all requests that end within the next `seconds`, sorted."""
    ended = {id(entry) for entry in scene.ledger.entries if entry.ended}
    await asyncio.sleep(seconds)
    new = [entry for entry in scene.ledger.entries if entry.outcome == "images" and id(entry) not in ended]
    return sorted(entry.seconds for entry in new)


async def _judge(scene: Scene, siege: Siege) -> None:
    report, api = scene.report, scene.stack.apis[0]
    (p50, p99), (p50_beside, p99_beside) = (
        (quantile(seconds, 0.5), quantile(seconds, 0.99)) for seconds in (siege.undisturbed, siege.beside)
    )
    report.note("undisturbed p50, p99 s", f"{p50:.2f}, {p99:.2f} ({len(siege.undisturbed)})")
    value = f"{p50_beside:.2f}, {p99_beside:.2f} ({len(siege.beside)})"
    held = bool(siege.beside) and p99_beside <= MAX_SLOWDOWN * p99
    report.check("beside attackers p50, p99 s", value, f"p99 <= {MAX_SLOWDOWN:g} times", held, timed=True)
    report.check("API that serves", "alive" if api.alive else f"exit {api.exit_code}", "alive", api.alive)
    if not api.alive:
        return
    before, most = siege.memory
    with suppress(TimeoutError):
        await until(lambda: usage.memory(api.pid) - before <= MAX_KEPT, BACK_S)
    with suppress(TimeoutError):
        await until(lambda: usage.descriptors(api.pid) <= siege.files + MAX_FILES_KEPT, BACK_S)
    after, files = usage.memory(api.pid), usage.descriptors(api.pid)
    value = f"{before / MIB:.0f}, {most / MIB:.0f}, {after / MIB:.0f}"
    goal = f"at most + {MAX_GROWTH // MIB}, + {MAX_KEPT // MIB}"
    bounded = most - before <= MAX_GROWTH and after - before <= MAX_KEPT
    report.check("API memory before, at most, after, MiB", value, goal, bounded)
    is_back = files <= siege.files + MAX_FILES_KEPT
    report.check("API descriptors before, after", f"{siege.files}, {files}", f"at most + {MAX_FILES_KEPT}", is_back)
