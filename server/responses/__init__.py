"""JSON responses and event streams, made from the records of jobs."""
