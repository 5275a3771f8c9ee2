"""Both sides of the queue in one object, for tests that play the API and an engine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine.jobs.connection import retry_while_away
from engine.jobs.consumer import JobConsumer
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord
from engine.jobs.producer import JobProducer
from engine.jobs.results import ImageResult, JobResult, PartialImage, StoredPartial


class JobQueue(JobProducer, JobConsumer):
    """Submits and follows as the API does, claims and commits as an engine does."""

    async def wait(self, job_id: str) -> JobRecord:
        """Wait until a job ends."""
        return await JobFollower(self, job_id).wait()

    async def result(self, job_id: str, *, outage_timeout_s: float = 0.0) -> JobResult | None:
        """Return a result with its images."""
        stored = await retry_while_away(lambda: self.stored_result(job_id, max_bytes=2**53), outage_timeout_s)
        if stored is None:
            return None
        images = [ImageResult(image.data or b"", image.seed, image.plan) for image in stored.images]
        return JobResult(images, stored.prompt_tokens, stored.plan_tokens, stored.source_tokens)

    async def follow(self, job_id: str) -> AsyncGenerator[JobRecord | PartialImage]:
        """Yield the updates of a job, partial images with their data."""
        async with aclosing(JobFollower(self, job_id).updates()) as updates:
            async for update in updates:
                if isinstance(update, StoredPartial):
                    data = await self.partial_data(job_id, update)
                    assert data is not None
                    yield PartialImage(update.image, update.index, data, update.grid)
                else:
                    yield update
