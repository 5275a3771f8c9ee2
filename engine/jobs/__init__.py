"""The Redis contract between the API and the engines. No torch in here.

job.py         what travels: job, record, claim, result
queue.py       `JobQueue`, all that can be done with a job: the API's part is in `api_side.py` and `following.py`, the
               engines' in `engine_side.py`, and both stand on `base.py`
scripts/       the changes of state and the keys, in Lua
codec.py       dataclasses to stored bytes and back
events.py      pub/sub
connection.py  the client, and Redis' errors
embedded.py    a Redis server of one's own
"""
