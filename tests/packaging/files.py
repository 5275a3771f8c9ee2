"""Readers of the project's files for the packaging tests."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer.main
import yaml

from server.cli.commands import app
from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.gpu.yml")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@dataclass
class BuildStage:
    """One `FROM` of the Dockerfile and what follows it: (instruction, rest of the line)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def dockerfile() -> dict[str, BuildStage]:
    """Return the stages by name, in order, with continued lines joined and without comments."""
    stages: dict[str, BuildStage] = {}
    for line in _logical_lines((ROOT / "Dockerfile").read_text()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = rest.split()
            stages[name] = BuildStage(name, base)
        else:
            list(stages.values())[-1].steps.append((instruction, rest))
    return stages


def image_steps(target: str) -> list[tuple[str, str]]:
    """Return all instructions for the image of `target`, including those of the stages it is based on."""
    stages = dockerfile()
    stage = stages[target]
    return [*(image_steps(stage.base) if stage.base in stages else []), *stage.steps]


def last(steps: list[tuple[str, str]], instruction: str) -> str | None:
    """Return the arguments of the last such instruction, the one that counts."""
    return next((rest for name, rest in reversed(steps) if name == instruction), None)


def image_environment(target: str) -> dict[str, str]:
    """Return the variables that `ENV` sets."""
    pairs = " ".join(rest for name, rest in image_steps(target) if name == "ENV")
    return dict(re.findall(r"(\w+)=(\S*)", pairs))


def variables_of(command: str) -> set[str]:
    """Return the environment variables of a `glimmer` command, for `serve` and `api` with all server settings."""
    options = typer.main.get_command(app).commands[command].params  # pyright: ignore[reportAttributeAccessIssue]
    names = {option.envvar for option in options if option.envvar}
    return names | (server_variables() if command in ("serve", "api") else set())


def server_variables() -> set[str]:
    return {f"GLIMMER_{name.upper()}" for name in ServerSettings.model_fields}


def _logical_lines(text: str) -> Iterator[str]:
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    yield from (line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines())
