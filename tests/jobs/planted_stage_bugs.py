"""Bugs of jobs between the stages, for `tests.jobs.planted_bugs`."""

from tests.planting import Bug

PRELUDE, RECORDS, CLAIM, HAND_OVER, RENEW, REQUEUE_ALL, OFFER, TAKE = (
    f"engine/jobs/lua/{name}.lua"
    for name in (
        "prelude",
        "prelude_records",
        "claim",
        "hand_over",
        "renew",
        "requeue_all",
        "offer_preview",
        "take_preview",
    )
)
STATEFUL = "tests/jobs/test_any_order.py"
TEST = "tests/jobs/test_hand_over.py"
UPGRADE = "tests/jobs/test_rolling_upgrade.py"

STAGE_BUGS = [
    Bug(
        "a hand-over takes any claim",
        HAND_OVER,
        "held_record(id, args.epoch)\n",
        "read_record(id)\n",
        TEST,
    ),
    Bug("any consumer can hand over", HAND_OVER, "record.engine ~= args.consumer or ", "", STATEFUL),
    Bug("a planned job is handed over again", HAND_OVER, " or record.stage then", " then", STATEFUL),
    Bug(
        "a hand-over loses the plans",
        HAND_OVER,
        "redis.call('HSET', plans_key(id), unpack(ARGV, 2))",
        "redis.call('HSET', plans_key(id), ARGV[2], ARGV[3])",
        STATEFUL,
    ),
    Bug("a handed over job is in no queue", HAND_OVER, "redis.call('XADD', queue, entry, 'job', id)\n", "", STATEFUL),
    Bug(
        "a handed over job stays to be planned",
        HAND_OVER,
        "redis.call('XDEL', queue_of(record), record.entry)\n",
        "",
        STATEFUL,
    ),
    Bug(
        "a handed over job stays pending",
        HAND_OVER,
        "redis.call('XACK', queue_of(record), GROUP, record.entry)\n",
        "",
        STATEFUL,
    ),
    Bug("a handed over job stays running", HAND_OVER, "redis.call('SREM', RUNNING, id)\n", "", STATEFUL),
    Bug(
        "a planned job takes no place",
        HAND_OVER,
        "redis.call('ZADD', WAITING, record.sequence, id)\n",
        "",
        STATEFUL,
    ),
    Bug(
        "a planned job waits as the last",
        HAND_OVER,
        "WAITING, record.sequence, id",
        "WAITING, now_ms(), id",
        STATEFUL,
    ),
    Bug("a hand-over keeps old progress", HAND_OVER, "'engine', 'progress')", "'engine')", STATEFUL),
    Bug(
        "a hand-over counts as a run", HAND_OVER, "if record.confirmed == record.epoch then", "if false then", STATEFUL
    ),
    Bug(
        "handing over an unconfirmed claim takes a run",
        HAND_OVER,
        "if record.confirmed == record.epoch then",
        "if true then",
        STATEFUL,
    ),
    Bug(
        "a hand-over forgives deaths",
        HAND_OVER,
        "redis.call('HDEL', job, 'engine', 'progress')",
        "redis.call('HDEL', job, 'engine', 'progress', 'death:1', 'death:2', 'death:3')",
        TEST,
    ),
    Bug(
        "a hand-over starts the runs anew",
        HAND_OVER,
        "redis.call('HINCRBY', job, 'runs', -1) end",
        "redis.call('HSET', job, 'runs', 0) end",
        TEST,
    ),
    Bug("a hand-over is not announced", HAND_OVER, "publish_state(id, 'queued')\n", "", TEST),
    Bug("a hand-over wakes planners", HAND_OVER, "wake_engines(id, 'render')", "wake_engines(id)", TEST),
    Bug("entries of both stages have the same ids", HAND_OVER, "args.id, 1e12", "args.id, 0", UPGRADE),
    Bug(
        "two hand-overs of a millisecond have one id",
        HAND_OVER,
        "if tonumber(time) < now then",
        "if true then",
        TEST,
    ),
    Bug(
        "an end leaves the entry of a planned job",
        PRELUDE,
        "local queue = queue_key(priority, stage)\n",
        "local queue = queue_key(priority)\n",
        STATEFUL,
    ),
    Bug(
        "requeue_all of one stage",
        PRELUDE,
        "    if redis.call('EXISTS', queue) == 1 then table.insert(queues, queue) end\n",
        "",
        STATEFUL,
    ),
    Bug(
        "a planned job goes back to the planners",
        PRELUDE,
        "'XCLAIM', queue_of(record), GROUP, REQUEUED",
        "'XCLAIM', queue_key(record.priority), GROUP, REQUEUED",
        STATEFUL,
    ),
    Bug("a requeued planned job wakes planners", PRELUDE, "wake_engines(id, record.stage)", "wake_engines(id)", TEST),
    Bug(
        "renew renews jobs to plan only",
        RENEW,
        "{'XCLAIM', queue_of(record),",
        "{'XCLAIM', queue_key(record.priority),",
        TEST,
    ),
    Bug(
        "a requeue revives what an old API has ended",
        REQUEUE_ALL,
        " and is_live(record.state) and record.entry",
        " and record.entry",
        UPGRADE,
    ),
    Bug("engines of a stage take all jobs", CLAIM, "or {args.stage}", "or {'render', 'plan'}", STATEFUL),
    Bug("what is planned comes last", CLAIM, "and {'render', 'plan'}", "and {'plan', 'render'}", STATEFUL),
    Bug("the stages share their turns", CLAIM, "and '' or ':' .. args.stage", "and '' or ''", TEST),
    Bug("planned jobs need KV memory", CLAIM, "(record.stage or record.kv", "(record.kv", TEST),
    Bug(
        "an early death in a renderer has no phase",
        RECORDS,
        "record.stage and 'rendering' or ''",
        "''",
        STATEFUL,
    ),
    Bug(
        "any stage will do",
        RECORDS,
        "  if record.stage and record.stage ~= 'render' then return false end\n",
        "",
        TEST,
    ),
    Bug("a preview of any claim is offered", OFFER, "if not holds(args.id, args.epoch) then return 0 end\n", "", TEST),
    Bug("previews pile up", OFFER, "redis.call('LTRIM', previews, -MAX_OFFERS, -1)\n", "", TEST),
    Bug("previews stay", OFFER, "redis.call('PEXPIRE', previews, RESULT_TTL_MS)\n", "", TEST),
    Bug("a preview of any claim is taken", TAKE, "if id and holds(id, tonumber(epoch)) then", "if id then", TEST),
]
