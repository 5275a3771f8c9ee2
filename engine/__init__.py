"""The engine: plans images token by token, renders them step by step, and takes its work from Redis.

The package itself, `engine.geometry`, `engine.errors` and `engine.jobs` import no torch: the API process uses them.
"""
