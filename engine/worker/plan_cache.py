import hashlib

import orjson

from engine.jobs.consumer import JobConsumer
from engine.jobs.job import JobSpec, Plan, SourceImages


class PlanCache:
    """Keeps plans in Redis for requests that differ in steps, guidance or format only.

    Args:
        planner: `GlmImage.planning_fingerprint()`.
        ttl_s: 0 keeps none.
    """

    def __init__(self, queue: JobConsumer, planner: str, ttl_s: int):
        self._queue, self._planner, self._ttl_s = queue, planner, ttl_s

    async def lookup(self, spec: JobSpec, sources: SourceImages | None) -> dict[int, Plan]:
        """Return the known plans by image index."""
        if not self._ttl_s or spec.plan:
            return {}
        plans = await self._queue.cached_plans([self._key(spec, sources, index) for index in range(spec.n)])
        return {index: plan for index, plan in enumerate(plans) if plan is not None}

    async def store(self, spec: JobSpec, sources: SourceImages | None, index: int, plan: Plan) -> None:
        """Keep the plan of image `index`."""
        if self._ttl_s:
            await self._queue.cache_plan(self._key(spec, sources, index), plan, self._ttl_s)

    def _key(self, spec: JobSpec, sources: SourceImages | None, index: int) -> str:
        """Hash everything a plan depends on."""
        geometry = spec.geometry
        source_hashes = [hashlib.sha256(file).hexdigest() for file in sources.files] if sources else []
        inputs = [
            self._planner, spec.prompt, source_hashes, geometry.canvas_width, geometry.canvas_height, spec.seed + index,
            spec.temperature, spec.top_p,
        ]  # fmt: skip
        return hashlib.sha256(orjson.dumps(inputs)).hexdigest()
