"""Logs, traces and metrics. No torch."""
