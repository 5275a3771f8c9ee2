"""Measure which bugs the stateful test finds: plant each in a copy of the code and run that test on it.

    python -m tests.jobs.planted_bugs [WORDS OF A NAME ...]

Prints for each bug the call sequence that found it. Exits with 1 if a bug is not found, by the stateful test or the one
named for it, or if a test fails without a bug.
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from engine.jobs.embedded import EmbeddedRedis
from tests import planting
from tests.jobs.planted_failover_bugs import FAILOVER_BUGS
from tests.jobs.planted_stage_bugs import STAGE_BUGS
from tests.jobs.test_any_order import SIZES, QueueMachine
from tests.planting import NOT_FOUND, copied, run_python, try_all

PRELUDE, RECORDS, SUBMIT, END_JOB, DISCARD, CLAIM, RENEW, REQUEUE, REQUEUE_ALL, COMMIT, API_HEARTBEAT, CACHE_PLAN = (
    f"engine/jobs/lua/{name}.lua"
    for name in (
        "prelude",
        "prelude_records",
        "submit",
        "end_job",
        "discard",
        "claim",
        "renew",
        "requeue",
        "requeue_all",
        "commit",
        "api_heartbeat",
        "cache_plan",
    )
)
CONSUMER = "engine/jobs/consumer.py"
STATEFUL = "tests/jobs/test_any_order.py"
LIFE_CYCLE = "tests/jobs/test_life_cycle.py"
KEPT = "tests/jobs/test_kept_bytes.py"
BLAME = "tests/jobs/test_blame.py"
BATCH_SHARE = "tests/jobs/test_batch_share.py"


@dataclass(frozen=True)
class Bug(planting.Bug):
    """A bug that the stateful test finds, or another if that cannot."""

    found_by: str = STATEFUL


BUGS: list[planting.Bug] = [
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
            f"if not {check}, args.epoch) then return 0 end\n",
            "",
        )
        for script, check in (
            ("progress", "holds(id"),
            ("checkpoint_plan", "holds(args.id"),
            ("partial_image", "holds(id"),
            ("commit", "held_record(id"),
            ("fail", "held_record(args.id"),
        )
    ),
    Bug("claim does not raise the epoch", CLAIM, "redis.call('HINCRBY', job, 'epoch', 1)", "1"),
    Bug("requeue raises the epoch", REQUEUE, "return 1", "return redis.call('HINCRBY', job_key(id), 'epoch', 1)"),
    Bug("any consumer can renew", RENEW, "epoch == epoch and record.engine == consumer", "epoch == epoch"),
    Bug("any consumer can requeue", REQUEUE, "not record or record.engine ~= args.consumer then", "not record then"),
    # leases
    Bug("claim ignores leases", CLAIM, "'IDLE', args.lease_ms, start", "'IDLE', 0, start"),
    Bug(
        "claim does not restart the lease",
        CLAIM,
        "consumer, 0, entry, 'JUSTID')\n  else",
        "consumer, 9e9, entry)\n  else",
    ),
    Bug(
        "renew renews nothing",
        RENEW,
        "'XCLAIM', queue_of(record), GROUP, consumer, 0, record.entry, 'JUSTID'}",
        "'PING'}",
    ),
    Bug("a requeued job waits for its lease", PRELUDE, "'TIME', 0, 'JUSTID'", "'JUSTID'"),
    Bug(
        "requeue_all of one priority",
        REQUEUE_ALL,
        "ipairs(all_queues()) do",
        "ipairs({queue_key('interactive'), queue_key('interactive', 'render')}) do",
    ),
    Bug("requeue_all takes the jobs of all engines", REQUEUE_ALL, "10000, consumer)", "10000)"),
    # the streams
    Bug("no XDEL at the end", PRELUDE, "  redis.call('XDEL', queue, entry)\n", ""),
    Bug("no XACK at the end", PRELUDE, "  redis.call('XACK', queue, GROUP, entry)\n", ""),
    Bug(
        "stale entries are not deleted",
        CLAIM,
        "entry)\n    redis.call('XDEL', queue, entry)",
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
        "if waiting >= args.max_queue",
        "if waiting + redis.call('SCARD', RUNNING) >= args.max_queue",
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
    Bug(
        "a claim does not free the place",
        CLAIM,
        "redis.call('ZREM', WAITING, id)\n  redis.call('SADD'",
        "redis.call('SADD'",
    ),
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
    Bug("batch gets every fourth claim", CLAIM, "overtaken + job.work, OVERTAKEN_JOBS", "overtaken + batch.work, ''"),
    Bug(
        "a turn does not use up what has overtaken",
        CLAIM,
        "math.min(overtaken - BATCH_TURN * job.work, ",
        "math.min(overtaken, ",
        BATCH_SHARE,
    ),
    Bug("a turn forgets what is left", CLAIM, "HSET', COUNTERS, OVERTAKEN, left,", "HSET', COUNTERS, OVERTAKEN, 0,"),
    Bug(
        "a burst follows a job that waited for room",
        CLAIM,
        "BATCH_TURN * job.work + interactive.work)",
        "math.huge)",
        BATCH_SHARE,
    ),
    Bug("turns are saved up without rivals", CLAIM, "redis.call('HDEL', COUNTERS, OVERTAKEN, OVERTAKEN_JOBS)", ""),
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
    Bug("images do not count", CLAIM, "record.images <= args.images", "true"),
    Bug("KV tokens do not count", CLAIM, "record.kv_tokens <= args.kv_tokens", "true"),
    Bug("source tokens do not count", CLAIM, "(record.source_tokens or 0) <= args.source_tokens", "true"),
    # confirmed claims and repeated attempts
    Bug(
        "an unconfirmed claim is a run",
        CLAIM,
        "return granted_claim(id, epoch, record.runs, quarantined)",
        "redis.call('HINCRBY', job, 'runs', 1) return granted_claim(id, epoch, record.runs, quarantined)",
    ),
    Bug("every renewal is a run", RENEW, "if record.confirmed ~= epoch then", "if true then"),
    Bug("no claim becomes a run", RENEW, "if record.confirmed ~= epoch then", "if false then"),
    Bug("a lapsed lease is a death unconfirmed", RECORDS, "or record.confirmed ~= record.epoch then", "then"),
    Bug("a repeated attempt gets another job", CLAIM, "if before then return before end\n", ""),
    Bug("any attempt gets the last grant", CLAIM, "if attempt ~= args.attempt then return nil end", ""),
    Bug(
        "an attempt gets a job that was taken over",
        CLAIM,
        "local record = held_record(id, tonumber(epoch))\n  if not record or record.engine ~= consumer",
        "local record = read_record(id)\n  if not record",
    ),
    Bug(
        "a repeated attempt does not restart the lease",
        CLAIM,
        "  take(queue_of(record), record.entry, true)\n",
        "",
        "tests/jobs/test_blame.py",
    ),
    Bug(
        "a lost confirmation is returned",
        CONSUMER,
        "granted is None or not await self.renew(consumer, [granted])",
        "True",
        "tests/jobs/test_blame.py",
    ),
    Bug(
        "an attempt is forgotten with its reply",
        CONSUMER,
        "            self._unanswered[consumer] = attempt\n",
        "",
        "tests/jobs/test_blame.py",
    ),
    # deaths, and jobs that are given up
    Bug("a handed back run counts", REQUEUE, "if record.confirmed == record.epoch then", "if false then"),
    Bug(
        "handing back an unconfirmed claim takes a run",
        REQUEUE,
        "if record.confirmed == record.epoch then",
        "if true then",
    ),
    Bug("requeue_all blames always", REQUEUE_ALL, "if death and args.blame then", "if death then"),
    Bug("requeue_all never blames", REQUEUE_ALL, "if death and args.blame then", "if false then"),
    Bug("a late verdict is ignored", REQUEUE_ALL, "if not args.blame then forgive_lapses() end", "", BLAME),
    Bug(
        "blame forgives earlier deaths",
        REQUEUE_ALL,
        "if not args.blame then forgive_lapses",
        "if true then forgive_lapses",
        BLAME,
    ),
    Bug("a death without blame is a run", REQUEUE_ALL, "elseif death then", "elseif false then"),
    Bug(
        "a lapsed lease is no death", CLAIM, "if record.death then store_death(id, record.epoch, record.death) end", ""
    ),
    Bug("a death counts for the next claim only", CLAIM, "deaths_in(id, record), pending", "{}, pending"),
    Bug("every death was alone", RECORDS, "alone = record.alone == record.epoch", "alone = true"),
    Bug("no death was alone", RECORDS, "alone = record.alone == record.epoch", "alone = false"),
    Bug(
        "a death forgets its phase",
        RECORDS,
        "type(progress.phase) == 'string' and progress.phase or record.stage",
        "record.stage",
        "tests/jobs/test_blame.py",
    ),
    Bug("a death forgets its step", RECORDS, "step = finite(progress.step)", "step = 0"),
    Bug("suspects run with others", CLAIM, "if #record.deaths == 0 and record.images", "if record.images"),
    Bug("suspects are not marked", CLAIM, "quarantined and 1 or 0", "0"),
    Bug("no job is given up", CLAIM, "if record.runs >= MAX_RUNS or is_poison(record.deaths) then", "if false then"),
    Bug("one death alone is enough", CLAIM, "if one.alone and other.alone and alike", "if one.alone and alike"),
    Bug("deaths in company are enough", CLAIM, "if one.alone and other.alone and alike", "if alike"),
    Bug("two lapsed leases are enough", CLAIM, "like >= 3", "like >= 2", BLAME),
    Bug("lapsed leases are never enough", CLAIM, " or like >= 3", "", BLAME),
    Bug("reports count no more than lapsed leases", CLAIM, "certain >= 2 or ", "", BLAME),
    Bug(
        "the step does not count",
        CLAIM,
        "return math.abs(one.step - other.step) <= slack",
        "return true",
        "tests/jobs/test_blame.py",
    ),
    Bug(
        "the phase does not count",
        CLAIM,
        "if one.phase == other.phase then",
        "if true then",
        "tests/jobs/test_blame.py",
    ),
    Bug("runs have no cap", CLAIM, "if record.runs >= MAX_RUNS or is", "if is", "tests/jobs/test_blame.py"),
    Bug("a dead-lettered job has no error", CLAIM, "finish(id, 'failed', dead_letter_error)", "finish(id, 'failed')"),
    Bug("a living engine is not absolved", RENEW, "absolve(id, record, epoch, consumer) end", "end", BLAME),
    Bug("anybody absolves", RECORDS, "or death.engine ~= consumer or absolved", "or absolved", BLAME),
    Bug(
        "an absolved run counts",
        RECORDS,
        "'runs', record.runs - 1, 'absolved'",
        "'absolved'",
        "tests/jobs/test_blame.py",
    ),
    Bug("absolutions have no cap", RECORDS, " or absolved >= MAX_ABSOLVED then", " then", "tests/jobs/test_blame.py"),
    Bug(
        "a late renewal takes a reported death back",
        REQUEUE_ALL,
        "    death.dead, death.engine = death.engine, nil\n",
        "",
        "tests/jobs/test_blame.py",
    ),
    # formats, damaged records and orphans
    Bug("an engine takes any format", CLAIM, "> args.max_format and", "> 99 and"),
    Bug(
        "newer jobs block the others",
        CLAIM,
        "    if not is_newer(new[2][2]) then return new[1], new[2][2], false end\n",
        "    if is_newer(new[2][2]) then return end\n    if true then return new[1], new[2][2], false end\n",
    ),
    Bug("newer jobs do not expire", CLAIM, "and now < (integer(deadline) or 0)", "", "tests/jobs/test_unreadable.py"),
    Bug("a job passed over is lost", CLAIM, "0, entry, 'TIME', 0, 'JUSTID')", "0, entry, 'JUSTID')"),
    Bug(
        "the format is not stored",
        SUBMIT,
        "if args.format then redis.call('HSET', job, 'format', args.format) end",
        "",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a damaged number stops a script",
        RECORDS,
        "if text and (not value or value < 0 and name ~= 'runs') or not text and not optional then return false end",
        "",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "any number is taken",
        RECORDS,
        "local value = integer(text)",
        "local value = tonumber(text)",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a commit does not look at the record",
        COMMIT,
        "held_record(id",
        "holds(id",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "infinite progress stops a script",
        RECORDS,
        "number and math.abs(number) < 1e15 and number or 0",
        "number or 0",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a damaged place in the queue is not noticed",
        CLAIM,
        "'stale' or 'unreadable', record\n",
        "'stale' or 'stale', record\n",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a claim looks at all newer jobs",
        CLAIM,
        "PAGE = 10, 64, 16",
        "PAGE = 10, 64, 1000",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a claim looks at the first newer jobs only",
        CLAIM,
        "redis.call('GET', looked) or second",
        "second",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a claim passes over any number of jobs",
        CLAIM,
        "delivered[queue], cleared = entry, cleared + 1",
        "delivered[queue] = entry",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a record of another type stops a script",
        RECORDS,
        "redis.pcall('HMGET'",
        "redis.call('HMGET'",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a damaged job keeps its place",
        RECORDS,
        "finish(id, 'failed', UNREADABLE)",
        "",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "a damaged spec ends the claim",
        CONSUMER,
        "with suppress(UnreadableJob), reading(job_id):\n                    return decode_claim",
        "with suppress(UnreadableJob):\n                    return decode_claim",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "types are not checked",
        "engine/jobs/codec.py",
        "    _adapter(type(record)).validate_python(record)\n",
        "",
        "tests/jobs/test_unreadable.py",
    ),
    Bug(
        "other errors of Redis are raised",
        "engine/jobs/connection.py",
        'raise QueueUnavailable(f"Redis answers with an error: {error}") from error',
        "raise",
        "tests/jobs/test_unreadable.py",
    ),
    Bug("claim runs orphans", CLAIM, "if is_orphan(record, now) then return 'orphan', record end", ""),
    Bug(
        "renew keeps orphans",
        RENEW,
        "elseif is_orphan(record, now) then",
        "elseif false then",
        "tests/jobs/test_blame.py",
    ),
    Bug("the API of a job is not stored", SUBMIT, "if args.api then redis.call('HSET', job, 'api', args.api) end", ""),
    Bug("heartbeats of APIs do not count", API_HEARTBEAT, "redis.call('ZADD', APIS, now, args.id)", "", BLAME),
    Bug(
        "orphans just after an outage",
        RECORDS,
        "return now - (tonumber(at) or 0) <= GAP_MS and",
        "return",
        "tests/jobs/test_blame.py",
    ),
    Bug(
        "a gap between heartbeats is not noticed",
        RECORDS,
        "if not at or now - at > GAP_MS or now < at then",
        "if not at then",
        "tests/jobs/test_blame.py",
    ),
    Bug(
        "plans of any planner are resumed",
        "engine/jobs/codec.py",
        'if data.get("planner", planner) == planner or not planner:',
        "if True:",
        "tests/jobs/test_blame.py",
    ),
    # deadlines and ends
    Bug("a claim ignores the deadline", CLAIM, "if now >= record.deadline then return 'expired', record end", ""),
    Bug("renew ignores the deadline", RENEW, "elseif now >= record.deadline then", "elseif false then"),
    Bug("expire comes early", END_JOB, "if state == 'expired' and now_ms() < record.deadline then return 0 end", ""),
    Bug(
        "an ended job can end again",
        END_JOB,
        "if not record or not is_live(record.state) then return 0 end",
        "if not record then return 0 end",
    ),
    Bug(
        "an end is not published",
        PRELUDE,
        "  expire_kept()\n  publish_state(id, state)",
        "  expire_kept()",
    ),
    Bug("an error is not stored", PRELUDE, "if error then change('error', error) end", ""),
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
        "if spec then change('spec', spec) end",
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
    Bug("source bytes are not added", SUBMIT, "redis.call('HINCRBY', COUNTERS, 'source_bytes', source_bytes)", ""),
    Bug(
        "sources may exceed their limit once",
        SUBMIT,
        "over(kept_sources, source_bytes, max_sources, 0)",
        "over(kept_sources, 0, max_sources, 0)",
    ),
    Bug("a large edit never fits", SUBMIT, "held > (little or limit / 16) and ", ""),
    # bytes that are kept
    Bug(
        "a live job counts for nothing",
        SUBMIT,
        "count_kept(id, owner, KEPT_BESIDE + results,",
        "count_kept(id, owner, 0,",
    ),
    Bug(
        "an end is not counted",
        PRELUDE,
        "  count_kept(id, owner or '', bytes, 0, now_ms() + RESULT_TTL_MS, files)\n",
        "",
    ),
    Bug("results do not count", PRELUDE, "+ partials + result + files", "+ partials + files"),
    Bug("partial images do not count", PRELUDE, "+ partials + result + files", "+ result + files"),
    Bug("a discarded result goes on counting", DISCARD, "count_ended(id, redis", "tostring(id, redis"),
    Bug("what is counted again is added", PRELUDE, "'bytes', bytes - (old_bytes or 0))", "'bytes', bytes)"),
    Bug(
        "owners have no counts",
        PRELUDE,
        "if owner ~= '' then\n    local more",
        "if false then\n    local more",
    ),
    Bug("what has expired goes on counting", SUBMIT, "look_again(now)\nlocal waiting", "local waiting", KEPT),
    Bug("a job that nothing ended stays", SUBMIT, "finish(id, 'expired')", "", KEPT),
    Bug("what an older process ended counts for nothing", SUBMIT, "count_ended(id, ttl, file_bytes(id))", "", KEPT),
    Bug("results have no limit", SUBMIT, "if over(kept, results, max_results) or", "if", KEPT),
    Bug(
        "results and sources have no limit",
        SUBMIT,
        " or over(kept + kept_sources, results + source_bytes, max_kept)",
        "",
        KEPT,
    ),
    Bug("an owner may keep everything", SUBMIT, "    or over(owned, results, part(max_results))", "   ", KEPT),
    Bug(
        "an owner may send all sources",
        SUBMIT,
        "has_sources and over(owned_sources",
        "false and over(owned_sources",
        KEPT,
    ),
    Bug("files do not count", PRELUDE, "copies == '1' and result or 0", "0", KEPT),
    Bug("files count with the result only", PRELUDE, "'^%d+ %d+ (%d+) ')", "'^%d+ %d+ (%d+)x')", KEPT),
    Bug("files count too short", PRELUDE, "return files > 0 and math.max", "return false and math.max", KEPT),
    Bug("a plan counts without what is beside it", CACHE_PLAN, "local BESIDE = 384", "local BESIDE = 0", KEPT),
    Bug("plans may take all of Redis", CACHE_PLAN, "maximum > 0 and math.min(", "false and math.min(", KEPT),
    Bug("what plans take is given to jobs", "server/admission/redis_memory.py", " - use.max_plan_bytes)", ")", KEPT),
    Bug("the counts stay for ever", PRELUDE, "do redis.call('PEXPIRE', key, RESULT_TTL_MS) end", "do end", KEPT),
    Bug("the counts expire before live jobs", SUBMIT, "do redis.call('PERSIST', name) end", "do end", KEPT),
    Bug(
        "an idempotency key outlives its job",
        PRELUDE,
        "if key then redis.call('PEXPIRE', idempotency_key(key), RESULT_TTL_MS) end",
        "",
        KEPT,
    ),
    Bug(
        "images may be larger than counted",
        "engine/jobs/result_size.py",
        '"png": 3.1, "jpeg": 2.2, "webp": 1.3',
        '"png": 2.5, "jpeg": 1.5, "webp": 1.0',
        KEPT,
    ),
    # idempotency keys
    Bug("a key is not stored", SUBMIT, "redis.call('SET', job_of_key, fingerprint .. ' ' .. id, 'PX'", "tostring('PX'"),
    Bug("a key ends before its job", SUBMIT, "'PX', args.timeout_ms + RESULT_TTL_MS)", "'PX', RESULT_TTL_MS)", KEPT),
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
        "return [claims[index] for index in lost]",
        "return claims[: len(lost)]",
    ),
    Bug(
        "plans come back under another index",
        "engine/jobs/codec.py",
        "plans[int(index)] =",
        "plans[int(index) + 1] =",
    ),
    Bug(
        "an attached request gets its own id",
        "engine/jobs/producer.py",
        'Submitted(reply.removeprefix(b"attached ").decode() if reply.startswith(b"attached ") else job_id)',
        "Submitted(job_id)",
    ),
    Bug(
        "a submit returns another deadline",
        "engine/jobs/producer.py",
        "now + round(timeout_s * 1000), JobState.QUEUED",
        "now, JobState.QUEUED",
        found_by=LIFE_CYCLE,
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
        "in enumerate(result.images):\n        if image.stored",
        "in enumerate(result.images[:1]):\n        if image.stored",
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
    clean = run_stateful()
    print(f"no bug: {clean}", flush=True)
    missed = try_all(BUGS + STAGE_BUGS + FAILOVER_BUGS, sys.argv[1:], try_bug)
    return 0 if clean == NOT_FOUND and not missed else 1


def try_bug(bug: planting.Bug) -> str:
    return run_stateful(bug) if bug.found_by == STATEFUL else planting.try_bug(bug)


def run_stateful(*bugs: planting.Bug) -> str:
    with copied(*bugs) as folder:
        ran = run_python(folder, "-m", "tests.jobs.planted_bugs", "--run")
    return ran.stdout.strip() or f"{NOT_FOUND}: {ran.stderr[-500:]}"


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
