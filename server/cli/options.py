"""Command-line options made from settings models."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from engine.config import EXIT_CONFIGURATION
from engine.errors import StartError
from server.settings import ENV_PREFIX, Flag

Model = TypeVar("Model", bound=BaseModel)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def flag(name: str, field: FieldInfo) -> str | None:
    """Return the flag of a setting; None if only the environment sets it."""
    for entry in field.metadata:
        if isinstance(entry, Flag):
            return entry.name
    return "--" + name.replace("_", "-")


def meaning(field: FieldInfo) -> str:
    """Return a setting's description with its limits."""
    limits = {type(entry): entry for entry in field.metadata}
    description = field.description or ""
    if Ge in limits and Le in limits:
        accepted = f"{limits[Ge].ge}..{limits[Le].le}"
    elif Ge in limits:
        accepted = f"{limits[Ge].ge} or more"
    elif Gt in limits:
        accepted = f"above {limits[Gt].gt}"
    else:
        return description
    return f"{description.removesuffix('.')} ({accepted})."


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's settings models by one option per field with a flag."""
    models = {name: model for name, model in get_type_hints(command).items() if name != "return"}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**{name: _build(model, values) for name, model in models.items()})

    parameters = [parameter for model in models.values() for parameter in _options(model)]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return run


def stop(message: str, code: int = EXIT_CONFIGURATION) -> NoReturn:
    """Print one line to stderr and exit."""
    with suppress(OSError):  # the code says enough if stderr is full or gone
        typer.echo(f"glimmer: {message}", err=True)
    raise typer.Exit(code)


def _options(model: type[BaseModel]) -> Iterator[inspect.Parameter]:
    for name, field in model.model_fields.items():
        if (option_flag := flag(name, field)) is None:
            continue
        # The model checks the limits: flags and variables get the same message.
        option = typer.Option(option_flag, envvar=variable(name), help=meaning(field))
        kind: Any = str | None if field.annotation == SecretStr | None else field.annotation
        default = inspect.Parameter.empty if field.is_required() else field.get_default()
        if field.default_factory is not None:
            kind, default = kind | None, None
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )


def _build(model: type[Model], values: dict[str, Any]) -> Model:
    try:
        return model(**{name: values[name] for name in model.model_fields if values.get(name) is not None})
    except StartError as error:
        stop(str(error))
    except ValidationError as error:
        detail = error.errors()[0]
        name = variable(str(detail["loc"][0])) if detail["loc"] else "settings"
        stop(f"{name}: {detail['msg'].removeprefix('Value error, ')}")
