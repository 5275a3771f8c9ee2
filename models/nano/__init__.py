"""The small trained checkpoint served by default, and its recipe."""

from pathlib import Path

NAME = "glimmer-nano"
CHECKPOINT: Path = Path(__file__).with_name("checkpoint")
