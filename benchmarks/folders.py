import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of the random checkpoint: `$XDG_CACHE_HOME/glimmer`, by default `~/.cache/glimmer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glimmer"
