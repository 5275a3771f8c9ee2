"""The Redis contract between the API and the engines. No torch in here.

job.py         what travels: job, record, claim, result
base.py        what both sides stand on: the client, the settings, the scripts, the subscriptions
producer.py    `JobProducer`: what the API does with jobs
consumer.py    `JobConsumer`: what engines do with jobs
follower.py    `JobFollower`: how the API waits for a job and follows it
lua/           the changes of state, one script each; the keys are in prelude.lua
scripts.py     runs them
codec.py       dataclasses to stored bytes and back
events.py      pub/sub
connection.py  the client, and Redis' errors
embedded.py    a Redis server of one's own
"""
