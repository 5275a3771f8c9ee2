"""The HTTP API: validates requests, submits them as jobs and returns the results. No torch."""
