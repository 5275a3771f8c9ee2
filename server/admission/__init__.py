"""Admission of requests: API keys, rate limits, room in the queue, ready engines."""
