"""The tables of docs/settings.md and the chart's lists of settings, made from the declarations. Write them with

python -m tests.packaging.settings_page
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import typer.main
from pydantic import BaseModel

from engine.config import CheckpointSettings, EngineSettings
from server.cli.commands import app
from server.cli.options import flag, meaning, variable
from server.settings import ServerSettings, ServeSettings
from tests.packaging.files import ROOT, variables_of

PAGE = ROOT / "docs" / "settings.md"
SCHEMA = ROOT / "deploy" / "helm" / "glimmer" / "values.schema.json"

# Variables that the chart sets from other values, or from a Secret.
_OF_THE_CHART = {
    "api": (
        "REDIS_URL", "HOST", "PORT", "API_KEY", "API_KEYS_FILE", "PROMPT_REWRITER_KEY", "GRACE_S", "RESULT_STORE",
        "RESULT_STORE_PUBLIC_URL",
    ),
    "engine": ("REDIS_URL", "ENGINE_ID", "STAGE", "MODEL", "GRACE_S", "RESULT_STORE"),
}  # fmt: skip
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def tables() -> dict[str, list[str]]:
    """Return the rows of each table by the heading it stands under."""
    of_serve = ServerSettings.model_fields.keys() | CheckpointSettings.model_fields.keys()
    engine = dict(_rows(EngineSettings))
    shared = {name: row for name, row in engine.items() if name in of_serve}
    return {
        "The API": list(dict(_rows(ServerSettings)).values()),
        "The engine": list((shared | engine).values()),
        "Both at once": list(dict(_rows(ServeSettings)).values()),
        "The client": list(_client_rows()),
    }


def with_tables(page: str) -> str:
    """Return the page with its tables as the settings declare them."""
    sections = re.split(r"(?m)^(?=## )", page)
    for heading, rows in tables().items():
        [index] = [index for index, section in enumerate(sections) if section.startswith(f"## {heading}\n")]
        table = "".join(f"{row}\n" for row in ["| variable | flag | default | |", "|---|---|---|---|", *rows])
        sections[index] = _TABLE.sub(lambda _, table=table: table, sections[index], count=1)
    return "".join(sections)


def with_settings(schema: str) -> str:
    """Return the chart's schema with the settings that a process takes in `api.settings` or `engine.settings`."""
    document = json.loads(schema)
    for command, excluded in _OF_THE_CHART.items():
        names = variables_of(command) - set(map(variable, excluded))
        document["$defs"][f"{command}Settings"]["propertyNames"]["anyOf"][1]["enum"] = sorted(names)
    return json.dumps(document, indent=2) + "\n"


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        default = None if field.is_required() or field.default_factory else field.default
        yield name, _row(variable(name), flag(name, field), default, meaning(field))


def _client_rows() -> Iterator[str]:
    """Yield those options of `generate` that are variables, too."""
    command: Any = typer.main.get_command(app)
    for option in command.commands["generate"].params:
        if option.envvar:
            yield _row(option.envvar, option.opts[-1], option.default, option.help)


def _row(name: str, option: str | None, default: object, text: str) -> str:
    shown = "" if default in (None, "") else f"`{default}`"
    return f"| `{name}` | {f'`{option}`' if option else ''} | {shown} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
    SCHEMA.write_text(with_settings(SCHEMA.read_text()))
