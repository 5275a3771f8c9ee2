"""The second stage: renders images."""
