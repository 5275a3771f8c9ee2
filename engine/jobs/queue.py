"""The job queue: the only thing the API and the engines both know.

A job is submitted once, claimed by engines until one of them ends it, and ends once. A claim is a lease: the engine
renews it while it works, and any engine may take a job whose lease has lapsed. Every claim has a new epoch, and what
an engine writes counts only while its epoch is the job's. So a job may run more than once, but has one visible end.
The states and their changes are in `engine.jobs.scripts`.
"""

from engine.jobs.engine_side import EngineSide
from engine.jobs.following import Following


class JobQueue(Following, EngineSide):
    """Jobs in Redis. Any number of processes may hold one; all must agree on the settings.

    Every method raises `QueueUnavailable` when Redis is away or refuses writes, unless its docstring says otherwise;
    it may be called again then. Scripts, consumer groups and subscriptions that a restarted or flushed Redis has lost
    are made again on the way.

    Args:
        redis: a client that returns bytes (see `engine.jobs.connection.connect`); stays the caller's to close.
        prefix: put before every key and channel.
        lease_ms: a claim that is not renewed for this long is open to others.
        result_ttl_s: how long the record and the result outlive the end of the job, in seconds.
        max_runs: a job that has cost this many engines their lease fails instead of being claimed again.
    """
