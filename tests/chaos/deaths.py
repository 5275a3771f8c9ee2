"""Engines that die: at random, of a job, and for want of memory."""

import os
from collections import Counter
from pathlib import Path

from tests.chaos.cases import MIXED, Case, Cases
from tests.chaos.evidence import Evidence
from tests.chaos.memory_cgroup import MemoryCgroup, NoMemoryCgroup
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, open_scene
from tests.chaos.sizes import Sizes
from tests.chaos.stub import HANG, OOM, POISON, StubSettings

MAX_RUNS = 10
LIVENESS_S = 15.0
HANG_KILL_INTERVAL_S = 15.0  # most hung engines are to end by themselves
ENGINES_BYTES = 512 * 2**20  # of all; a fork has allocated little itself
STEPS = (6, 60)


async def random_kills(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kill any engine at random moments, in the second half under a supervisor."""
    async with (
        open_scene("random kills", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed, steps=STEPS)), sizes.concurrency),
    ):
        await scene.faults.kill_at_random(sizes.random_kills // 2, sizes.kill_interval_s)
        scene.stack.requeues_on_death = True
        await scene.faults.kill_at_random(sizes.random_kills, sizes.kill_interval_s)
    evidence = Evidence.read(folder)
    claims = list(evidence.all_claims())
    killed = len(scene.faults.killed_at_random)
    again = [claim for claim in claims if claim.epoch > 1]
    alone = Counter(c.job for c in claims if c.quarantined and (c.job, c.epoch) not in evidence.freed)
    scene.report.note("engines killed", f"{killed}, one in {sizes.kill_interval_s:g} s on average")
    scene.report.note("runs beyond the first, of these alone", f"{len(again)}, {sum(c.quarantined for c in again)}")
    scene.report.note("jobs killed while alone once, more often", f"{len(alone)}, {sum(n > 1 for n in alone.values())}")
    most = max(claim.runs for claim in claims)
    scene.report.check("most runs of a job", most, f"<= {MAX_RUNS}", most <= MAX_RUNS)
    scene.report.check("engines that died otherwise", scene.stack.crashes - killed, "0", scene.stack.crashes == killed)
    return scene.report.figures


# --- jobs that end engines --------------------------------------------------------------------------------------------


async def poison(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Mix jobs that crash their engine with ordinary ones, the second half under a supervisor and beside random kills.

    Without one, a random kill is no different from a crash, and counts.
    """
    async with (
        open_scene("poison job", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
    ):
        outcomes = await fatal_jobs(scene, POISON, (sizes.poison + 1) // 2)
        scene.stack.requeues_on_death = True
        async with scene.faults.random_kills(sizes.kill_interval_s):
            outcomes |= await fatal_jobs(scene, POISON, (sizes.poison + 1) // 2)
    _judge_fatal(scene, Evidence.read(folder), outcomes)
    return scene.report.figures


async def fatal_jobs(scene: Scene, name: str, count: int) -> dict[str, str]:
    """Submit fatal jobs one after the other. Returns their outcomes by prompt."""
    outcomes: dict[str, str] = {}
    for _ in range(count):
        scene.fatal += 1
        number = scene.fatal
        case = Case(-number, "job", f"{name} {number}", seed=number)
        entry = await scene.clients.serve(case)
        scene.ledger.entries.remove(entry)  # it has to fail
        outcomes[case.prompt] = entry.outcome
    return outcomes


def not_given_up(outcomes: dict[str, str]) -> list[str]:
    return [f"{prompt}: {outcome}" for prompt, outcome in outcomes.items() if "brought its engine down" not in outcome]


def _judge_fatal(scene: Scene, evidence: Evidence, outcomes: dict[str, str]) -> None:
    report, killed = scene.report, len(scene.faults.killed_at_random)
    alone = {prompt: [claim.quarantined for claim in evidence.runs_of(prompt)] for prompt in outcomes}
    report.note("fatal jobs, engines killed at random", f"{len(outcomes)}, {killed}")
    report.check_none("not given up as such", not_given_up(outcomes))
    runs = Counter(map(len, alone.values()))
    report.note("given up after", ", ".join(f"{count} runs ({jobs} jobs)" for count, jobs in sorted(runs.items())))
    wrong = [
        f"{prompt}: {runs}"
        for prompt, runs in alone.items()
        if runs[-2:] != [True, True] or runs != sorted(runs) or runs[0] or len(runs) > MAX_RUNS
    ]
    report.check_none("not in company first, then twice alone or more often", wrong)
    deaths, total = scene.stack.crashes, sum(map(len, alone.values()))
    report.check("engines that died", deaths, "one by each run or kill", max(total, killed) <= deaths <= total + killed)


async def hang(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Run a step that never ends; its engine has to end. Other engines are killed at random."""
    async with (
        open_scene("hung step", folder, seed, StackSettings(requeue_on_death=True)) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
        scene.faults.random_kills(max(sizes.kill_interval_s, HANG_KILL_INTERVAL_S)),
    ):
        outcomes = await fatal_jobs(scene, HANG, 1)
    evidence = Evidence.read(folder)
    ended = {death.engine: death.at for death in scene.stack.deaths}
    waits = [ended[engine] - began for engine, began in evidence.hangs.items() if engine in ended]
    slowest = max(waits, default=float("inf"))
    scene.report.check("until its engine ends, max s", slowest, f"<= {LIVENESS_S:g}", slowest <= LIVENESS_S, timed=True)
    by_themselves = evidence.hangs.keys() - scene.faults.killed_at_random
    scene.report.check("of these by themselves", len(by_themselves), "> 0", bool(by_themselves))
    _judge_fatal(scene, evidence, outcomes)
    return scene.report.figures


async def oom(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Run jobs that take memory without end; the kernel kills their engine. Others are killed at random."""
    root = folder / "root"
    root.mkdir(parents=True)
    try:
        cgroup = MemoryCgroup(f"glimmer-chaos-{os.getpid()}", ENGINES_BYTES)
        settings = StackSettings(requeue_on_death=True, cgroup=cgroup, oom_root=cgroup.view(root))
        killer = "the kernel"
    except NoMemoryCgroup as error:
        counter = root / "proc/vmstat"
        counter.parent.mkdir()
        counter.write_text("oom_kill 0\n")
        settings = StackSettings(requeue_on_death=True, oom_root=root, stub=StubSettings(oom_counter=counter))
        killer = f"the stub, with a false count: no memory cgroup ({error})"
    async with (
        open_scene("out of memory", folder, seed, settings) as scene,
        scene.load(iter(Cases(seed, {**MIXED, "disconnects": 0})), sizes.concurrency),
        scene.faults.random_kills(sizes.kill_interval_s),
    ):
        outcomes = await fatal_jobs(scene, OOM, sizes.oom)
    scene.report.note("engines killed by", killer)
    _judge_fatal(scene, Evidence.read(folder), outcomes)
    return scene.report.figures
