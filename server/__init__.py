"""The HTTP API: validates requests, submits jobs and returns the results. No torch."""
