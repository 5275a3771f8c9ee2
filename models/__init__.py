"""Networks and checkpoints, independent of requests, queues and HTTP."""
