"""The job queue in Redis; lua/prelude.lua documents states and keys. No torch."""
