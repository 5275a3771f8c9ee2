"""Write `deploy/requirements/*.txt`: the exact packages, with hashes, that the container images are built from.

    make lock

`torch.txt` has torch and its CUDA libraries, which a build for machines without a GPU takes from another index.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "requirements"
PYTHON = "3.12"  # of the images

_CUDA = re.compile(r"(torch|triton|nvidia-|cuda-)")


def resolve(source: str, extras: Sequence[str] = (), text: str | None = None) -> list[str]:
    """Return one block per package: its pin and its hashes."""
    command = [sys.executable, "-m", "uv", "pip", "compile", source, "--quiet", "--generate-hashes", "--no-header"]
    command += ["--no-annotate", "--python-version", PYTHON, "--universal"]
    command += [word for extra in extras for word in ("--extra", extra)]
    lines = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout
    # The images are for Linux.
    return [block for block in re.split(r"\n(?=\S)", lines.strip()) if "sys_platform == 'win32'" not in block]


def write(name: str, blocks: list[str]) -> None:
    """Write one file."""
    (FOLDER / name).write_text("# Written by `make lock`.\n" + "\n".join(blocks) + "\n")


def main() -> None:
    """Resolve the dependencies of pyproject.toml anew."""
    write("api.txt", resolve("pyproject.toml", ["otel", "s3"]))
    engine = resolve("pyproject.toml", ["engine", "otel", "s3"])
    write("engine.txt", [block for block in engine if not _CUDA.match(block)])
    write("torch.txt", [block for block in engine if _CUDA.match(block)])
    write("build.txt", resolve("-", text="setuptools>=77\nwheel\n"))


if __name__ == "__main__":
    main()
