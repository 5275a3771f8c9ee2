"""Keys, rate limits, room in the queue, ready engines."""
