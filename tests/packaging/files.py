"""The project's own files, as the packaging tests read them."""

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
    """The stages by name, in order. Continued lines are joined, comments left out."""
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
    """All instructions that shape the image of `target`: its own and those of the stages it starts from."""
    stages = dockerfile()
    stage = stages[target]
    return [*(image_steps(stage.base) if stage.base in stages else []), *stage.steps]


def last(steps: list[tuple[str, str]], instruction: str) -> str | None:
    """What the last such instruction says; Docker takes that one."""
    return next((rest for name, rest in reversed(steps) if name == instruction), None)


def image_environment(target: str) -> dict[str, str]:
    """The variables that `ENV` sets."""
    pairs = " ".join(rest for name, rest in image_steps(target) if name == "ENV")
    return dict(re.findall(r"(\w+)=(\S*)", pairs))


def variables_of(command: str) -> set[str]:
    """The environment variables that a `glimmer` command reads; those with an API also read all server settings."""
    options = typer.main.get_command(app).commands[command].params  # pyright: ignore[reportAttributeAccessIssue]
    names = {option.envvar for option in options if option.envvar}
    return names | (server_variables() if command in ("serve", "api") else set())


def server_variables() -> set[str]:
    return {f"GLIMMER_{name.upper()}" for name in ServerSettings.model_fields}


def _logical_lines(text: str) -> Iterator[str]:
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    yield from (line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines())
