"""Plans kept in Redis, so that the same request is not planned twice. No torch.

A plan follows from the model (`GlmImage.planning_fingerprint`), the prompt, the pictures to edit, the size, the seed
and the sampling, and from nothing else; these make its key. Steps, guidance and output format are free to change:
trying those on a plan costs no planning.
"""

import hashlib

import orjson

from engine.jobs.consumer import JobConsumer
from engine.jobs.job import JobSpec, Plan, SourceImages


class PlanCache:
    """The plans of one planner.

    Args:
        planner: what tells this planner from every other.
        ttl_s: seconds a plan is kept; 0 keeps none.
    """

    def __init__(self, queue: JobConsumer, planner: str, ttl_s: int):
        self._queue, self._planner, self._ttl_s = queue, planner, ttl_s

    async def known(self, spec: JobSpec, sources: SourceImages | None) -> dict[int, Plan]:
        """The plans that are kept for the images of a request, by image index.

        Raises:
            QueueUnavailable: Redis is away.
        """
        if not self._ttl_s or spec.plan:
            return {}
        plans = await self._queue.cached_plans([self._key(spec, sources, index) for index in range(spec.n)])
        return {index: plan for index, plan in enumerate(plans) if plan is not None}

    async def keep(self, spec: JobSpec, sources: SourceImages | None, index: int, plan: Plan) -> None:
        """Keeps a plan that was written for image number `index`.

        Raises:
            QueueUnavailable: Redis is away.
        """
        if self._ttl_s:
            await self._queue.cache_plan(self._key(spec, sources, index), plan, self._ttl_s)

    def _key(self, spec: JobSpec, sources: SourceImages | None, index: int) -> str:
        geometry = spec.geometry
        pictures = [hashlib.sha256(picture).hexdigest() for picture in sources.files] if sources else []
        decides = [
            self._planner, spec.prompt, pictures, geometry.canvas_width, geometry.canvas_height, spec.seed + index,
            spec.temperature, spec.top_p,
        ]  # fmt: skip
        return hashlib.sha256(orjson.dumps(decides)).hexdigest()
