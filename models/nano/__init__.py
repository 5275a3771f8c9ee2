"""The small trained checkpoint that is served where no other is named, and how it is made."""

from pathlib import Path

NAME = "glimmer-nano"
CHECKPOINT: Path = Path(__file__).with_name("checkpoint")
