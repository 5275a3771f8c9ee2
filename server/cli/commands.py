"""The `glimmer` command. Subcommands import what they run when called: `health` starts often."""

import os
import sys
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from engine.checkpoint_files import check_checkpoint
from engine.config import CheckpointSettings, EngineSettings
from engine.cores import set_thread_defaults
from engine.observability import logs
from engine.stop_signals import StopSignals, run
from server.cli.generate import generate
from server.cli.health import health
from server.cli.options import settings_as_options, stop, variable
from server.cli.process import OneLineGroup, end_process, one_line_errors, prepare_streams
from server.settings import ServerSettings, ServeSettings, is_service_link

app = typer.Typer(
    cls=OneLineGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, prompts among them
    rich_markup_mode=None,
)


def _show_version(is_asked_for: bool) -> None:
    if is_asked_for:
        typer.echo(f"glimmer {metadata.version('glimmer')}")
        raise typer.Exit


@app.callback()
def glimmer(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Glimmer serves GLM-Image behind an OpenAI-style images API. Start with: glimmer serve"""
    for name in [name for name, value in os.environ.items() if is_service_link(name, value)]:
        del os.environ[name]


@app.command()
@settings_as_options
def serve(checkpoint: CheckpointSettings, processes: ServeSettings, settings: ServerSettings) -> None:
    """Run everything on one machine: API, engines and a Redis. Ctrl+C finishes running jobs, then stops."""
    signals = StopSignals().install()
    logs.configure(settings.log_level, settings.log_format)
    for_engines = checkpoint.model_dump(exclude_none=True)
    for_engines |= settings.model_dump(
        include={"grace_s", "log_level", "log_format", "result_store"}, exclude_none=True
    )
    environment = {variable(name): str(value) for name, value in for_engines.items()}
    check_checkpoint(checkpoint.model)
    if checkpoint.model:  # other servers are asked for a model by the name they were started with
        names = f"{settings.served_model_name},{checkpoint.model}"
        settings = settings.model_copy(update={"served_model_name": names})
    from server.processes.launch import EngineProcesses, run_all

    engines = EngineProcesses(processes.engines, processes.data_dir, checkpoint.device, environment)
    raise typer.Exit(run_all(settings, engines, signals))


@app.command()
@settings_as_options
def api(settings: ServerSettings) -> None:
    """Run the HTTP API alone; engines work on its jobs through the same Redis."""
    if settings.redis_url is None:
        stop("glimmer api needs a Redis: set --redis-url or GLIMMER_REDIS_URL")
    signals = StopSignals().install()
    logs.configure(settings.log_level, settings.log_format)
    from server.processes.launch import run_api

    run_api(settings, signals)


@app.command()
@settings_as_options
def engine(settings: EngineSettings) -> None:
    """Run one engine process: it takes jobs from Redis, plans and renders. Needs `pip install glimmer[engine]`."""
    signals = StopSignals().install()
    logs.configure(settings.log_level, settings.log_format)
    if sys.stderr is None or not sys.stderr.isatty():
        # No progress bars in a log of one line per event. The libraries read these on import.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    set_thread_defaults(os.environ)
    check_checkpoint(settings.model)
    from engine.jobs.redis_check import check_redis

    run(check_redis(settings.redis_url))
    with one_line_errors("an engine needs `pip install glimmer[engine]`"):
        from engine.worker.process import main as run_engine

        raise typer.Exit(run_engine(settings, signals))


app.command()(generate)
app.command()(health)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Name of the key's owner: letters, digits, - and _.")]) -> None:
    """Create an API key. The key goes to stderr once, its table to stdout: glimmer key alice >> keys.toml"""
    from server.admission.keys import NAME, key_table, new_key

    if not NAME.fullmatch(name):
        stop("a name has 1..64 letters, digits, - and _, and starts with a letter or a digit")
    made = new_key()
    typer.echo(f"The key of {name}; it is not stored anywhere:\n\n    {made}\n", err=True)
    typer.echo(key_table(name, made))


def main() -> NoReturn:
    """Run the `glimmer` command and end the process."""
    prepare_streams()
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
    end_process(0)
