"""Benchmarks of the server, the engine and the default checkpoint: `python -m benchmarks.NAME --help`."""
