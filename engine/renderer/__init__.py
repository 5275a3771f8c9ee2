"""Renders images."""
