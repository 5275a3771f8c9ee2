"""The campaign that tries to lose jobs: real processes, real signals, a client that keeps books.

`python -m tests.chaos` starts a Redis with its append-only file, APIs and engines, lets seeded clients ask for pictures
while seeded faults happen, and then compares what the clients were told with what Redis holds and with what the
engines wrote down. Only the model is a stub: its steps sleep, and its pictures follow from prompt, seed and plan.

stub.py       the model that sleeps, and the engine process around it
journal.py    what an engine process writes down as it happens, and the queue that does it
evidence.py   what the journals of all engines prove
processes.py  Redis, APIs and engines: start, kill, freeze, drain
cases.py      what is asked for, and which bytes must come back
clients.py    how it is asked for: plain, streamed, as a job, many times with one key; clients that leave
ledger.py     what the clients were told
faults.py     kills, freezes and outages, seeded
redis_contents.py  what is left in Redis at the end
scene.py      a stack with clients, and what has to hold after anything
scenarios.py  load and faults together; traffic.py: load that is itself the fault
campaign.py   all scenarios by name
soak.py       the same load for a long time, and whether anything grows
report.py     figures against goals
"""
