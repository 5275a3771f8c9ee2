"""docs/settings.md has every setting, as the program itself knows them."""

import dataclasses
import re
from typing import Any

import pytest
import typer.main
from pydantic import SecretStr

from engine.config import EngineSettings
from server.cli.commands import app
from server.settings import ServerSettings
from tests.packaging.files import ROOT, server_variables, variables_of

PAGE = (ROOT / "docs" / "settings.md").read_text()
COMMANDS = ("serve", "api", "engine", "generate")


def options(command: str) -> dict[str, Any]:
    """A command's options that are variables, too, by the variable."""
    found = typer.main.get_command(app).commands[command].params  # pyright: ignore[reportAttributeAccessIssue]
    return {option.envvar: option for option in found if option.envvar}


def row(variable: str, option: Any) -> str:
    """Of the table for an option of the command line."""
    default = option.show_default if isinstance(option.show_default, str) else option.default
    return _row(variable, option.opts[-1], default, option.help)


def _row(variable: str, flag: str, default: object, meaning: str) -> str:
    shown = "" if default is None or default == "" else f"`{default}`"
    return f"| `{variable}` | {flag and f'`{flag}`'} | {shown} | {meaning} |"


def of_the_api() -> list[str]:
    flags = options("serve")
    rows = []
    for name, field in ServerSettings.model_fields.items():
        variable = f"GLIMMER_{name.upper()}"
        flag = flags[variable].opts[-1] if variable in flags else ""
        rows.append(_row(variable, flag, field.default, field.description or ""))
    return rows


def of_the_engine() -> list[str]:
    """Those that `serve` has flags for, too, and the others."""
    own = options("engine")
    shared = [name for name in own if name in options("serve")]
    return [row(name, own[name]) for name in (*shared, *(name for name in own if name not in shared))]


TABLES = {
    "api": of_the_api,
    "engine": of_the_engine,
    "serve": lambda: [row(name, options("serve")[name]) for name in ("GLIMMER_ENGINES", "GLIMMER_DATA_DIR")],
    "generate": lambda: [row(name, option) for name, option in options("generate").items()],
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_settings(name: str) -> None:
    table = "\n".join(["| variable | flag | default | |", "|---|---|---|---|", *TABLES[name]()])
    assert f"\n\n{table}\n" in PAGE, f"docs/settings.md is to have this table:\n\n{table}"


def test_no_setting_is_left_out_and_none_is_made_up() -> None:
    named = set(re.findall(r"GLIMMER_[A-Z_]*[A-Z]", PAGE))
    assert named == server_variables().union(*(variables_of(command) for command in COMMANDS))
    assert named >= {f"GLIMMER_{field.name.upper()}" for field in dataclasses.fields(EngineSettings)}


def test_a_secret_is_no_flag_s_default() -> None:
    """`--help` and this page show defaults."""
    assert not [name for name, field in ServerSettings.model_fields.items() if isinstance(field.default, SecretStr)]
