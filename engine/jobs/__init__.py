"""The Redis contract between the API and the engines. No torch in here.

job.py         what travels: job, record, claim, result
queue.py       `JobQueue`, all that can be done with a job
scripts.py     the changes of state and the keys, in Lua
codec.py       dataclasses to stored bytes and back
events.py      pub/sub
connection.py  the client, and Redis' errors
embedded.py    a Redis server of one's own
"""
