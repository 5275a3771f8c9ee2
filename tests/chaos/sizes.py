"""Sizes of the scenarios."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The defaults are a full campaign.

    Args:
        jobs, kills: of `kills`; the kills are spread over the jobs.
        redis_kills, freezes, leavers, poison, random_kills, oom: of the scenario of that name.
        kill_interval_s: between two random kills, on average.
        failovers: of each kind of Redis, in `failover`.
        flaps: disturbances of `flapping`.
        faults: engine kills and freezes of `everything`.
        stage_kills: of an engine or a whole stage, in `stages`.
        restarts: of every API and engine, in `rolling`.
        overload_s: seconds of ten times the load that can be served.
        attack_s: seconds of load without and beside the attacks of `slow_clients` and `hostile`.
        connections: idle connections of `slow_clients`; of its other attacks, an eighth.
        hostile_clients: clients that send hostile requests.
        concurrency: clients at once, unless a scenario needs more.
    """

    jobs: int = 5000
    kills: int = 100
    random_kills: int = 60
    kill_interval_s: float = 5.0
    redis_kills: int = 20
    failovers: int = 10
    flaps: int = 80
    freezes: int = 50
    leavers: int = 1000
    poison: int = 10
    oom: int = 4
    faults: int = 40
    stage_kills: int = 40
    restarts: int = 4
    overload_s: float = 600.0
    attack_s: float = 60.0
    connections: int = 2400
    hostile_clients: int = 8
    concurrency: int = 18


SHORT = Sizes(
    jobs=100,
    kills=4,
    random_kills=4,
    kill_interval_s=1.0,
    redis_kills=2,
    failovers=2,
    flaps=8,
    freezes=2,
    leavers=30,
    poison=1,
    oom=1,
    faults=6,
    stage_kills=4,
    restarts=1,
    overload_s=5.0,
    attack_s=3.0,
    connections=400,
    hostile_clients=3,
    concurrency=12,
)
