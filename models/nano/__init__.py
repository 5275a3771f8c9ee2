"""The small trained checkpoint that is served by default, and the recipe that makes it."""

from pathlib import Path

NAME = "glimmer-nano"
CHECKPOINT: Path = Path(__file__).with_name("checkpoint")
