"""The engine process: connects the job queue with the engine."""
