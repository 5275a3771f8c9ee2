from collections.abc import Sequence

from engine.jobs.job import EngineInfo
from server.errors import ENGINE_RETRY_S, unavailable

STAGES = {"plan": "plans", "render": "renders"}  # with what their engines do


def ready_engines(engines: Sequence[EngineInfo], stage: str | None = None) -> list[EngineInfo]:
    """Return the engines that accept work, of one stage if given."""
    return [engine for engine in engines if engine.state == "ready" and (stage is None or engine.has_stage(stage))]


def models_of(engines: Sequence[EngineInfo]) -> set[str]:
    """Return the fingerprints of the models of ready engines that differ, if any; older engines send none.

    Engines of one stage are compared with those that have its weights.
    """
    ready = ready_engines(engines)
    whole, planners, renderers = (
        {getattr(engine, part) for engine in ready} - {""} for part in ("fingerprint", "planner", "renderer")
    )
    return max((whole, planners, renderers), key=len)


def require_ready(engines: Sequence[EngineInfo], last_known: EngineInfo | None = None) -> EngineInfo:
    """Return an engine that plans (all serve the same model); raise a 503 if a stage has none that is ready.

    Args:
        last_known: taken where none is, and no stage is required.
    """
    if last_known is not None:
        return next(iter(ready_engines(engines, "plan")), last_known)
    if reason := not_ready_reason(engines):
        raise unavailable(reason, ENGINE_RETRY_S)
    return ready_engines(engines, "plan")[0]


def not_ready_reason(engines: Sequence[EngineInfo]) -> str | None:
    """Return which stage has no ready engine, and why; None if each has one."""
    missing = [stage for stage in STAGES if not ready_engines(engines, stage)]
    if not missing:
        return None
    if not engines:
        return "No engine is running."
    stage = missing[0]
    states = sorted({engine.state for engine in engines if engine.has_stage(stage)})
    clause = "" if len(missing) == len(STAGES) and states else f" that {STAGES[stage]}"
    if not states:
        return f"No engine {STAGES[stage]}."
    if states == ["starting"]:
        return f"The engine{clause} is still starting."
    return f"No engine{clause} is ready (states: {', '.join(states)})."
