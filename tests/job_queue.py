"""Both sides of the queue in one object, for tests that play the API and an engine."""

from collections.abc import AsyncGenerator

from engine.jobs.consumer import JobConsumer
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord, PartialImage
from engine.jobs.producer import JobProducer


class JobQueue(JobProducer, JobConsumer):
    """Submits and follows as the API does, claims and commits as an engine does."""

    async def wait(self, job_id: str) -> JobRecord:
        """Wait until a job ends."""
        return await JobFollower(self, job_id).wait()

    def follow(self, job_id: str) -> AsyncGenerator[JobRecord | PartialImage]:
        """Yield the updates of a job."""
        return JobFollower(self, job_id).updates()
