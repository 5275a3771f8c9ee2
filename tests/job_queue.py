"""Both sides of the queue in one object, for tests that play the API and an engine."""

from engine.jobs.consumer import JobConsumer
from engine.jobs.producer import JobProducer


class JobQueue(JobProducer, JobConsumer):
    """Submit as the API does, claim and commit as an engine does."""
