from engine.jobs.job import EngineInfo
from server.errors import ENGINE_RETRY_S, unavailable


def ready_engines(engines: list[EngineInfo]) -> list[EngineInfo]:
    """Return the engines that accept work."""
    return [engine for engine in engines if engine.state == "ready"]


def models_of(engines: list[EngineInfo]) -> set[str]:
    """Return the fingerprints of the models of ready engines; older engines send none."""
    return {engine.fingerprint for engine in ready_engines(engines)} - {""}


def require_ready(engines: list[EngineInfo]) -> EngineInfo:
    """Return a ready engine (all serve the same model); raise a 503 without one."""
    ready = ready_engines(engines)
    if not ready:
        raise unavailable(not_ready_reason(engines), ENGINE_RETRY_S)
    return ready[0]


def not_ready_reason(engines: list[EngineInfo]) -> str:
    """Return why none of `engines` is ready."""
    if not engines:
        return "No engine is running."
    states = sorted({engine.state for engine in engines})
    if states == ["starting"]:
        return "The engine is still starting."
    return f"No engine is ready (states: {', '.join(states)})."
