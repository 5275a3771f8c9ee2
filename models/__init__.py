"""Networks and checkpoints. Nothing here knows of requests, queues or HTTP."""
