"""Measure which bugs the stateful test finds: plant each in a copy of the code and run that test on it.

    python -m tests.jobs.planted_bugs [WORDS OF A NAME ...]

Prints for each bug the call sequence that found it. Exits with 1 if a bug is not found, by the stateful test or the one
named for it, or if a test fails without a bug.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from engine.jobs.embedded import EmbeddedRedis
from tests.jobs.test_any_order import SIZES, QueueMachine

ROOT = Path(__file__).parents[2]
PRELUDE, SUBMIT, END_JOB, DISCARD, CLAIM, RENEW, REQUEUE, REQUEUE_ALL, COMMIT = (
    f"engine/jobs/lua/{name}.lua"
    for name in ("prelude", "submit", "end_job", "discard", "claim", "renew", "requeue", "requeue_all", "commit")
)
STATEFUL = "tests/jobs/test_any_order.py"
LIFE_CYCLE = "tests/jobs/test_life_cycle.py"
BATCH_SHARE = "tests/jobs/test_batch_share.py"
NOT_FOUND = "not found"


@dataclass(frozen=True)
class Bug:
    """Replaces `old` by `new` in a file, once.

    Args:
        found_by: the test that finds it, if the stateful one cannot.
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str = STATEFUL


BUGS = [
    # epochs and consumers
    Bug("no epoch check", PRELUDE, "state == 'running' and tonumber(current) == epoch", "state == 'running'"),
    Bug(
        "no check whether the job still runs",
        PRELUDE,
        "state == 'running' and tonumber(current) == epoch",
        "tonumber(current) == epoch",
    ),
    *(
        Bug(
            f"{script} takes any claim",
            f"engine/jobs/lua/{script}.lua",
            f"if not holds({job}, args.epoch) then return 0 end\n",
            "",
        )
        for script, job in (
            ("progress", "id"),
            ("checkpoint_plan", "args.id"),
            ("partial_image", "id"),
            ("commit", "id"),
            ("fail", "args.id"),
        )
    ),
    Bug("claim does not raise the epoch", CLAIM, "redis.call('HINCRBY', job, 'epoch', 1)", "1"),
    Bug("requeue raises the epoch", REQUEUE, "'runs', -1)", "'epoch', redis.call('HINCRBY', job_key(id), 'runs', -1))"),
    Bug("any consumer can renew", RENEW, "epoch) or engine ~= consumer then\n", "epoch) then\n"),
    Bug("any consumer can requeue", REQUEUE, "epoch) or engine ~= args.consumer then return 0", "epoch) then return 0"),
    # leases
    Bug("claim ignores leases", CLAIM, "'IDLE', args.lease_ms, '-'", "'IDLE', 0, '-'"),
    Bug(
        "claim does not restart the lease",
        CLAIM,
        "consumer, 0, entry, 'JUSTID')\n  else",
        "consumer, 9e9, entry)\n  else",
    ),
    Bug(
        "renew renews nothing", RENEW, "redis.call('XCLAIM', queue_key(priority), GROUP, consumer", "tostring(consumer"
    ),
    Bug("a requeued job waits for its lease", PRELUDE, "'TIME', 0, 'JUSTID'", "'JUSTID'"),
    Bug(
        "requeue_all of one priority",
        REQUEUE_ALL,
        "{'interactive', 'batch'}) do\n  local queue",
        "{'interactive'}) do\n  local queue",
    ),
    Bug("requeue_all takes the jobs of all engines", REQUEUE_ALL, "10000, consumer)", "10000)"),
    # the streams
    Bug("no XDEL at the end", PRELUDE, "  redis.call('XDEL', queue, entry)\n", ""),
    Bug("no XACK at the end", PRELUDE, "  redis.call('XACK', queue, GROUP, entry)\n", ""),
    Bug(
        "stale entries are not deleted",
        CLAIM,
        "entry)\n      redis.call('XDEL', queue, entry)",
        "entry)",
        "tests/jobs/test_admission.py",
    ),
    Bug("the group begins at the end of the stream", PRELUDE, "GROUP, '0', 'MKSTREAM'", "GROUP, '$', 'MKSTREAM'"),
    # places in the queue
    Bug(
        "a dry run queues the job",
        SUBMIT,
        "if args.dry_run then return 'accepted' end",
        "",
        "tests/jobs/test_admission.py",
    ),
    Bug("max_queue one too high", SUBMIT, ">= args.max_queue", "> args.max_queue"),
    Bug(
        "running jobs count against max_queue",
        SUBMIT,
        "('ZCARD', WAITING) >=",
        "('ZCARD', WAITING) + redis.call('SCARD', RUNNING) >=",
    ),
    Bug(
        "an end does not free the place",
        PRELUDE,
        "redis.call('ZREM', WAITING, id)\n  redis.call('SREM'",
        "redis.call('SREM'",
    ),
    Bug(
        "an end leaves the job running",
        PRELUDE,
        "  redis.call('SREM', RUNNING, id)\n  redis.call('DEL'",
        "  redis.call('DEL'",
    ),
    Bug("a claim does not free the place", CLAIM, "redis.call('ZREM', WAITING, id)", ""),
    Bug(
        "a requeued job takes no place",
        PRELUDE,
        "redis.call('ZADD', WAITING, redis.call('HGET', job, 'sequence'), id)",
        "",
    ),
    Bug("a requeued job goes to the end", PRELUDE, "redis.call('HGET', job, 'sequence'), id)", "now_ms(), id)"),
    Bug("max_owned one too high", SUBMIT, ">= args.max_owned", "> args.max_owned"),
    Bug("an end does not free the owner's place", PRELUDE, "redis.call('SREM', owned_key(owner), id)", "owner = ''"),
    # the order of claims
    Bug("batch has no turn", CLAIM, "then job = batch end", "then job = interactive end"),
    Bug("batch has every turn", CLAIM, "if both and overtaken >= BATCH_TURN * batch.work", "if both and true"),
    Bug("batch gets every fourth claim", CLAIM, "overtaken + job.work, 'overtaken_jobs'", "overtaken + batch.work, ''"),
    Bug(
        "a turn does not use up what has overtaken",
        CLAIM,
        "math.min(overtaken - BATCH_TURN * job.work, ",
        "math.min(overtaken, ",
        BATCH_SHARE,
    ),
    Bug(
        "a turn forgets what is left", CLAIM, "HSET', COUNTERS, 'overtaken', left,", "HSET', COUNTERS, 'overtaken', 0,"
    ),
    Bug(
        "a burst follows a job that waited for room",
        CLAIM,
        "BATCH_TURN * job.work + interactive.work)",
        "math.huge)",
        BATCH_SHARE,
    ),
    Bug("turns are saved up without rivals", CLAIM, "redis.call('HDEL', COUNTERS, 'overtaken', 'overtaken_jobs')", ""),
    Bug(
        "a batch job that does not fit stops others",
        CLAIM,
        "(batch.fits or overtaken",
        "(true or overtaken",
        BATCH_SHARE,
    ),
    Bug(
        "a batch job that does not fit starves",
        CLAIM,
        " or overtaken >= HOLD_TURN * batch.work and overtaken_jobs >= HOLD_JOBS)",
        ")",
        BATCH_SHARE,
    ),
    Bug("a small batch job holds others at once", CLAIM, " and overtaken_jobs >= HOLD_JOBS)", ")", BATCH_SHARE),
    Bug(
        "an interactive job that does not fit is passed over",
        CLAIM,
        "interactive or batch\n",
        "interactive and (interactive.fits or not batch) and interactive or batch\n",
    ),
    Bug("images do not count", CLAIM, "tonumber(images) <= args.images", "true"),
    Bug("KV tokens do not count", CLAIM, "tonumber(kv_tokens) <= args.kv_tokens", "true"),
    Bug("source tokens do not count", CLAIM, "tonumber(source_tokens or 0) <= args.source_tokens", "true"),
    # quarantined and dead-lettered jobs
    Bug(
        "runs are not counted", CLAIM, "redis.call('HINCRBY', job, 'runs', 1)", "redis.call('HINCRBY', job, 'runs', 0)"
    ),
    Bug("a requeue counts as a run", REQUEUE, "redis.call('HINCRBY', job_key(id), 'runs', -1)\n", ""),
    Bug("requeue_all blames always", REQUEUE_ALL, "if not args.blame then", "if false then"),
    Bug("requeue_all never blames", REQUEUE_ALL, "if not args.blame then", "if true then"),
    Bug("quarantined jobs run with others", CLAIM, "if runs < QUARANTINE_RUNS and ", "if "),
    Bug("quarantined jobs are not marked", CLAIM, "runs > QUARANTINE_RUNS and 1 or 0", "0"),
    Bug("no job is dead-lettered", CLAIM, "if runs >= args.max_runs then return 'dead letter' end", ""),
    Bug("a dead-lettered job has no error", CLAIM, "finish(id, 'failed', dead_letter_error)", "finish(id, 'failed')"),
    # deadlines and ends
    Bug("a claim ignores the deadline", CLAIM, "if now_ms() >= tonumber(deadline) then return 'expired' end", ""),
    Bug("renew ignores the deadline", RENEW, "elseif now >= tonumber(deadline) then", "elseif false then"),
    Bug("expire comes early", END_JOB, "if state == 'expired' and now_ms() < tonumber(deadline) then return 0 end", ""),
    Bug(
        "an ended job can end again",
        END_JOB,
        "if not is_live(current) then return 0 end",
        "if not current then return 0 end",
    ),
    Bug(
        "an end is not published",
        PRELUDE,
        "redis.call('PEXPIRE', job, RESULT_TTL_MS)\n  publish_state(id, state)",
        "redis.call('PEXPIRE', job, RESULT_TTL_MS)",
    ),
    Bug("an error is not stored", PRELUDE, "if error then redis.call('HSET', job, 'error', error) end", ""),
    Bug(
        "a discarded result stays",
        DISCARD,
        "redis.call('DEL', result_key(id), partials_key(id))",
        "redis.call('DEL', partials_key(id))",
    ),
    Bug(
        "a discard before the submit is forgotten",
        DISCARD,
        "redis.call('SET', withdrawn_key(id), 1, 'PX', RESULT_TTL_MS)",
        "",
    ),
    Bug(
        "a submit overwrites its job",
        SUBMIT,
        "redis.call('EXISTS', job, withdrawn_key(id))",
        "redis.call('EXISTS', withdrawn_key(id))",
    ),
    # what an ended job keeps
    Bug(
        "an ended job keeps its prompt",
        PRELUDE,
        "if spec then redis.call('HSET', job, 'spec', spec) end",
        "",
        LIFE_CYCLE,
    ),
    Bug(
        "an ended job keeps its prompt twice",
        PRELUDE,
        "redis.call('HDEL', job, 'ended_spec', 'ended_notes')",
        "",
        LIFE_CYCLE,
    ),
    Bug("a failed job keeps its rewritten prompt", PRELUDE, "if notes and notes ~= '' and", "if false and", LIFE_CYCLE),
    Bug("a succeeded job loses its notes", PRELUDE, "notes ~= '' and state ~= 'succeeded'", "notes ~= ''", LIFE_CYCLE),
    Bug(
        "an ended record keeps its texts",
        "engine/jobs/job.py",
        ' | {"prompt": "", "negative_prompt": "", "plan": None}',
        "",
        LIFE_CYCLE,
    ),
    # keys beside the job
    Bug(
        "plans stay", PRELUDE, "redis.call('DEL', plans_key(id), sources_key(id))", "redis.call('DEL', sources_key(id))"
    ),
    Bug(
        "sources stay", PRELUDE, "redis.call('DEL', plans_key(id), sources_key(id))", "redis.call('DEL', plans_key(id))"
    ),
    Bug("partial images stay", PRELUDE, "redis.call('PEXPIRE', partials_key(id), RESULT_TTL_MS)", ""),
    Bug("results stay", COMMIT, "redis.call('PEXPIRE', result_key(id), RESULT_TTL_MS)", ""),
    Bug("records stay", PRELUDE, "redis.call('PEXPIRE', job, RESULT_TTL_MS)", ""),
    Bug(
        "old progress stays",
        PRELUDE,
        "redis.call('HDEL', job, 'engine', 'progress')",
        "redis.call('HDEL', job, 'engine')",
    ),
    Bug("source bytes are not subtracted", PRELUDE, "'source_bytes', -source_bytes)", "'source_bytes', 0)"),
    Bug("source bytes are not added", SUBMIT, "redis.call('HINCRBY', COUNTERS, 'source_bytes', args.source_bytes)", ""),
    Bug("sources may exceed their limit once", SUBMIT, "held + args.source_bytes >", "held >"),
    Bug("a large edit never fits", SUBMIT, "if held > 0 and held +", "if held +"),
    # idempotency keys
    Bug("a key is not stored", SUBMIT, "if key ~= '' then redis.call('SET'", "if false then redis.call('SET'"),
    Bug(
        "a refused request stores its key",
        SUBMIT,
        "then return 'full' end",
        "then redis.call('SET', job_of_key, fingerprint .. ' ' .. id) return 'full' end",
    ),
    Bug(
        "a key leads to a job without a result",
        SUBMIT,
        "if is_live(state) or state == 'succeeded' and redis.call('EXISTS', result_key(known)) == 1 then",
        "if state then",
    ),
    Bug("a key takes any request", SUBMIT, "if first and first ~= fingerprint then return 'reused' end", ""),
    # Python
    Bug(
        "renew names the wrong claims",
        "engine/jobs/consumer.py",
        'return [claims[index] for index in await self._scripts.run("renew", consumer=consumer, claims=held)]',
        'return claims[: len(await self._scripts.run("renew", consumer=consumer, claims=held))]',
    ),
    Bug(
        "plans come back under another index",
        "engine/jobs/codec.py",
        "int(index): Plan.from_dict",
        "int(index) + 1: Plan.from_dict",
    ),
    Bug(
        "an attached request gets its own id",
        "engine/jobs/producer.py",
        'return reply.removeprefix(b"attached ").decode() if reply.startswith(b"attached ") else job_id',
        "return job_id",
    ),
    Bug("expire cancels", "engine/jobs/base.py", "JobState.EXPIRED.value", "JobState.CANCELLED.value"),
    Bug(
        "many stale entries end a claim",
        "engine/jobs/consumer.py",
        "if reply is None:",
        "if not isinstance(reply, list):",
        "tests/jobs/test_admission.py",
    ),
    Bug(
        "only the first image is committed",
        "engine/jobs/codec.py",
        "in enumerate(result.images):\n        fields",
        "in enumerate(result.images[:1]):\n        fields",
        LIFE_CYCLE,
    ),
    Bug(
        "a wake-up is lost between claim and wait",
        "engine/jobs/events.py",
        "                await self._work.wait()\n        self._work.clear()",
        "                self._work.clear()\n                await self._work.wait()",
        "tests/jobs/test_waiting.py",
    ),
]


def main() -> int:
    wanted = sys.argv[1:]
    clean = try_bug(Bug("no bug", PRELUDE, "", ""))
    print(f"no bug: {clean}", flush=True)
    missed = int(clean != NOT_FOUND)
    for bug in BUGS:
        if all(word in bug.name for word in wanted):
            found = try_bug(bug)
            missed += found.startswith(NOT_FOUND)
            print(f"{bug.name}: {found}", flush=True)
    return 1 if missed else 0


def try_bug(bug: Bug) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("engine", "server", "models", "tests"):
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("node_modules", "__pycache__", "nano")
            )
        shutil.copy(ROOT / "pyproject.toml", copy)
        plant(bug, copy)
        if bug.found_by == STATEFUL:
            command = ["-m", "tests.jobs.planted_bugs", "--run"]
        else:
            command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", bug.found_by]
        environment = {**os.environ, "PYTHONPATH": folder}
        ran = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
        if bug.found_by == STATEFUL:
            return ran.stdout.strip() or f"{NOT_FOUND}: {ran.stderr[-500:]}"
        return f"found by {bug.found_by}" if ran.returncode == 1 else NOT_FOUND


def plant(bug: Bug, root: Path) -> None:
    """Plant a bug; raise AssertionError if the code has changed, so that it cannot be planted."""
    file = root / bug.file
    code = file.read_text()
    assert bug.old in code, f"{bug.name}: {bug.old!r} is not in {bug.file}"
    file.write_text(code.replace(bug.old, bug.new, 1) if bug.old else code)


def run() -> None:
    """Run the stateful test in the copy, without the search for a smaller example."""
    sequences = itertools.count(1)
    failed: list[int] = []

    class Counted(QueueMachine):
        def __init__(self) -> None:
            super().__init__()
            self.number = next(sequences)

        def teardown(self) -> None:
            kind = sys.exc_info()[0]
            # exceptions of hypothesis only end a sequence
            broken = kind is not None and not kind.__module__.startswith("hypothesis")
            try:
                super().teardown()
            except BaseException:
                broken = True
                raise
            finally:
                if broken:
                    failed.append(self.number)

    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), fsync="no") as server:
        QueueMachine.server = server
        try:
            sizes = settings(
                SIZES, phases=[Phase.generate], database=None, print_blob=False, report_multiple_bugs=False
            )
            run_state_machine_as_test(Counted, settings=sizes)
        except BaseException as error:  # `pytest.raises` fails with a BaseException
            print(f"found by call sequence {failed[0]} ({type(error).__name__})")
        else:
            print(NOT_FOUND)


if __name__ == "__main__":
    sys.exit(run() if "--run" in sys.argv else main())
