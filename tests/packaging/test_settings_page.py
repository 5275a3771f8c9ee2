"""docs/settings.md has every setting as it is declared."""

import re

from pydantic import SecretStr

from engine.config import EngineSettings
from server.settings import ServerSettings
from tests.packaging.files import server_variables, variables_of
from tests.packaging.settings_page import PAGE, SCHEMA, with_settings, with_tables

COMMANDS = ("serve", "api", "engine", "generate")


def test_the_page_has_the_settings() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page), "write the tables: python -m tests.packaging.settings_page"


def test_the_chart_takes_the_settings() -> None:
    schema = SCHEMA.read_text()
    assert schema == with_settings(schema), "write the lists: python -m tests.packaging.settings_page"


def test_the_page_names_exactly_the_variables_that_exist() -> None:
    named = set(re.findall(r"GLIMMER_[A-Z_]*[A-Z]", PAGE.read_text()))
    assert named == server_variables().union(*(variables_of(command) for command in COMMANDS))
    assert named >= {f"GLIMMER_{name.upper()}" for name in EngineSettings.model_fields}


def test_a_secret_is_not_a_default() -> None:
    """`--help` and this page show defaults."""
    assert not [name for name, field in ServerSettings.model_fields.items() if isinstance(field.default, SecretStr)]
