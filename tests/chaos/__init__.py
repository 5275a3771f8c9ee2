"""Chaos campaign: real processes, real signals, and clients that record every response.

`python -m tests.chaos` starts a Redis with its append-only file, APIs and engines. Seeded clients request images during
seeded faults; afterwards their records are compared with the contents of Redis and the journals of the engines. Only
the model is a stub: its steps sleep, and its images follow from prompt, seed and plan.

stub               model that sleeps, and the engine process around it
journal            journal of an engine process
evidence           what the journals of all engines prove
processes          Redis, APIs and engines: start, kill, freeze, drain
cases              requests and the bytes they must return
clients            clients: plain, streaming, polling, with idempotency keys, disconnecting
ledger             what the clients received
faults             seeded kills, freezes and outages
memory_cgroup      a limit on the memory of engines
redis_contents     what is left in Redis at the end
scene              processes with clients, and the checks after every scenario
sizes              sizes of the scenarios
scenarios          load with faults
deaths             load with engines that die at random, of jobs, or for want of memory
traffic            load that is itself the fault
attacks            load beside attackers
attackers          the attackers' process
hostile_requests   what some of them send
campaign           all scenarios by name
soak               long load, to find growth
usage              memory and descriptors of processes
report             figures and goals
"""
