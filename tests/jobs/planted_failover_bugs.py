"""Bugs of a queue whose master changes, for `tests.jobs.planted_bugs`."""

from tests.planting import Bug

PRODUCER, MASTERS = "engine/jobs/producer.py", "engine/jobs/masters.py"
TEST = "tests/jobs/test_failover.py"
UNSAFE = f"{TEST}::test_a_job_without_replicas_is_not_acknowledged_by_whatever_reply"

FAILOVER_BUGS = [
    Bug("replicas are not counted", PRODUCER, "reached < self._min_replicas:", "reached < 0:", UNSAFE),
    Bug(
        "replicas count for new jobs alone", PRODUCER, "if not is_refused and", "if isinstance(reply, list) and", UNSAFE
    ),
    Bug(
        "the master is asked for once",
        MASTERS,
        "if self._found is None or time.monotonic() - self._found_at > _FOUND_FOR_S:",
        "if self._found is None:",
        f"{TEST}::test_a_former_master_that_still_answers_acknowledges_nothing",
    ),
]
