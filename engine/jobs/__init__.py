"""The job queue in Redis, between the API and the engines; lua/prelude.lua documents states and keys. No torch."""
