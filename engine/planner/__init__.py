"""Writes plans."""
