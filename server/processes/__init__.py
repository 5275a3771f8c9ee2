"""How it runs: the API process, the supervisor of engines, the embedded Redis."""
