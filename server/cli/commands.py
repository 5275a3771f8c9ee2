"""The `glimmer` command. Every flag can also be given as the environment variable that `--help` shows beside it."""

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from engine.config import EXIT_CONFIGURATION, EngineSettings, LogFormat, LogLevel, Stage
from engine.errors import QueueUnavailable
from engine.jobs.job import Priority
from engine.observability import logs
from engine.observability.tracing import TracingError
from server.cli import client
from server.requests.schemas import Quality
from server.settings import ServerSettings

app = typer.Typer(
    help="Glimmer serves GLM-Image behind an OpenAI-style images API. Start with: glimmer serve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, prompts among them
    rich_markup_mode=None,
)

_FIELDS = ServerSettings.model_fields

PARTIAL_IMAGES = 2  # of `glimmer generate --partials`, when it is not told how many


def _setting(name: str, flag: str | None = None) -> Any:
    """An option that stands for a field of `ServerSettings`: its help and its variable."""
    return typer.Option(
        flag or f"--{name.replace('_', '-')}",
        envvar=f"GLIMMER_{name.upper()}",
        help=_FIELDS[name].description,
    )


def default_data_dir() -> Path:
    """Where `glimmer serve` keeps its queue: `$XDG_DATA_HOME/glimmer`, by default `~/.local/share/glimmer`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "glimmer"


Host = Annotated[str, _setting("host")]
Port = Annotated[int, _setting("port")]
RedisUrl = Annotated[str | None, _setting("redis_url")]
ApiKey = Annotated[str | None, _setting("api_key")]
ApiKeys = Annotated[Path | None, _setting("api_keys_file", "--api-keys")]
CorsOrigins = Annotated[str, _setting("cors_origins")]
PromptRewriter = Annotated[str | None, _setting("prompt_rewriter")]
ServedModelName = Annotated[str, _setting("served_model_name")]
MaxQueue = Annotated[int, _setting("max_queue")]
GraceS = Annotated[float, _setting("grace_s")]
Level = Annotated[LogLevel, _setting("log_level")]
Lines = Annotated[LogFormat, _setting("log_format")]
Model = Annotated[
    str | None,
    typer.Option(envvar="GLIMMER_MODEL", help="Checkpoint folder or hub id; without it the small one that is shipped."),
]
Device = Annotated[str, typer.Option(envvar="GLIMMER_DEVICE", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(envvar="GLIMMER_DTYPE", help="auto, float32 or bfloat16.")]


def _server_settings(context: typer.Context) -> ServerSettings:
    """The settings that a command's flags stand for; what has no flag comes from the environment."""
    try:
        return ServerSettings(**{name: value for name, value in context.params.items() if name in _FIELDS})
    except ValidationError as error:
        detail = error.errors()[0]
        name = str(detail["loc"][0]) if detail["loc"] else "settings"
        _stop(f"GLIMMER_{name.upper()}: {detail['msg'].removeprefix('Value error, ')}")


def _stop(message: str) -> NoReturn:
    """Ends the command because of how it was called."""
    typer.echo(f"glimmer: {message}", err=True)
    raise typer.Exit(EXIT_CONFIGURATION)


@app.command()
def serve(
    context: typer.Context,
    model: Model = None,
    host: Host = _FIELDS["host"].default,
    port: Port = _FIELDS["port"].default,
    device: Device = EngineSettings.device,
    dtype: Dtype = EngineSettings.dtype,
    engines: Annotated[
        int, typer.Option(envvar="GLIMMER_ENGINES", min=1, help="Engine processes; with several GPUs one for each.")
    ] = 1,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="GLIMMER_DATA_DIR", help="Where the queue is kept.", show_default="~/.local/share/glimmer"),
    ] = None,
    max_queue: MaxQueue = _FIELDS["max_queue"].default,
    api_key: ApiKey = None,
    api_keys_file: ApiKeys = None,
    cors_origins: CorsOrigins = _FIELDS["cors_origins"].default,
    prompt_rewriter: PromptRewriter = None,
    served_model_name: ServedModelName = _FIELDS["served_model_name"].default,
    redis_url: RedisUrl = None,
    grace_s: GraceS = _FIELDS["grace_s"].default,
    log_level: Level = _FIELDS["log_level"].default,
    log_format: Lines = _FIELDS["log_format"].default,
) -> None:
    """Everything on one machine: the API, the engines and a Redis. Ctrl+C finishes what runs, then stops."""
    from server.admission.keys import KeyFileError
    from server.processes.launch import EngineProcesses, run_all
    from server.processes.serving import StartError

    settings = _server_settings(context)
    logs.configure(log_level, log_format)
    environment = {"GLIMMER_DEVICE": device, "GLIMMER_DTYPE": dtype, "GLIMMER_LOG_LEVEL": log_level}
    environment |= {"GLIMMER_LOG_FORMAT": log_format, "GLIMMER_GRACE_S": str(grace_s)}
    if model is not None:
        environment["GLIMMER_MODEL"] = model
    plan = EngineProcesses(engines, data_dir or default_data_dir(), device, environment)
    try:
        code = run_all(settings, plan)
    except (StartError, QueueUnavailable, KeyFileError, TracingError) as error:
        _stop(str(error))
    raise typer.Exit(code)


@app.command()
def api(
    context: typer.Context,
    redis_url: RedisUrl = None,
    host: Host = _FIELDS["host"].default,
    port: Port = _FIELDS["port"].default,
    max_queue: MaxQueue = _FIELDS["max_queue"].default,
    api_key: ApiKey = None,
    api_keys_file: ApiKeys = None,
    cors_origins: CorsOrigins = _FIELDS["cors_origins"].default,
    prompt_rewriter: PromptRewriter = None,
    served_model_name: ServedModelName = _FIELDS["served_model_name"].default,
    grace_s: GraceS = _FIELDS["grace_s"].default,
    log_level: Level = _FIELDS["log_level"].default,
    log_format: Lines = _FIELDS["log_format"].default,
) -> None:
    """The HTTP API alone; engines reach it through the same Redis."""
    from server.admission.keys import KeyFileError
    from server.processes.launch import run_api
    from server.processes.serving import StartError

    settings = _server_settings(context)
    if settings.redis_url is None:
        _stop("glimmer api needs a Redis: set --redis-url or GLIMMER_REDIS_URL")
    logs.configure(log_level, log_format)
    try:
        run_api(settings)
    except (StartError, KeyFileError, TracingError) as error:
        _stop(str(error))


@app.command()
def engine(
    redis_url: Annotated[
        str, typer.Option(envvar="GLIMMER_REDIS_URL", help="Where the jobs are: redis://host:6379/0 or unix:///path.")
    ],
    model: Model = None,
    device: Device = EngineSettings.device,
    dtype: Dtype = EngineSettings.dtype,
    stage: Annotated[Stage, typer.Option(envvar="GLIMMER_STAGE", help="all: it plans and renders.")] = "all",
    engine_id: Annotated[
        str | None,
        typer.Option(envvar="GLIMMER_ENGINE_ID", help="A name never used before; made up when left out."),
    ] = None,
    lease_s: Annotated[
        float, typer.Option(envvar="GLIMMER_LEASE_S", min=1, help="Seconds until a dead engine's jobs are free.")
    ] = EngineSettings.lease_s,
    max_images: Annotated[
        int | None, typer.Option(envvar="GLIMMER_MAX_IMAGES", min=1, help="Images in flight at most.")
    ] = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(envvar="GLIMMER_MAX_PROMPT_TOKENS", min=1, help="Longer prompts are refused.")
    ] = EngineSettings.max_prompt_tokens,
    kv_tokens: Annotated[
        int | None, typer.Option(envvar="GLIMMER_KV_TOKENS", min=1, help="Tokens the planner's KV cache holds.")
    ] = None,
    render_token_budget: Annotated[
        int | None,
        typer.Option(envvar="GLIMMER_RENDER_TOKEN_BUDGET", min=1, help="Tokens of one renderer tick at most."),
    ] = None,
    plan_cache_s: Annotated[
        int,
        typer.Option(
            envvar="GLIMMER_PLAN_CACHE_S", min=0, help="Seconds a plan is kept for the same request; 0: none."
        ),
    ] = EngineSettings.plan_cache_s,
    grace_s: Annotated[
        float, typer.Option(envvar="GLIMMER_GRACE_S", min=0, help="Seconds running jobs get after SIGTERM.")
    ] = EngineSettings.grace_s,
    log_level: Level = EngineSettings.log_level,
    log_format: Lines = EngineSettings.log_format,
) -> None:
    """One engine process alone: takes jobs from Redis, plans and renders. Needs `pip install glimmer[engine]`."""
    logs.configure(log_level, log_format)
    if not sys.stderr.isatty():
        _no_progress_bars()
    settings = EngineSettings(
        redis_url=redis_url,
        engine_id=engine_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
        model=model,
        device=device,
        dtype=dtype,
        stage=stage,
        lease_s=lease_s,
        max_images=max_images,
        max_prompt_tokens=max_prompt_tokens,
        kv_tokens=kv_tokens,
        render_token_budget=render_token_budget,
        plan_cache_s=plan_cache_s,
        grace_s=grace_s,
        log_level=log_level,
        log_format=log_format,
    )
    try:
        from engine.worker.process import main as run_engine
    except ModuleNotFoundError as error:
        _stop(f"{error.name} is not installed; an engine needs `pip install glimmer[engine]`")
    raise typer.Exit(run_engine(settings))


def _no_progress_bars() -> None:
    """Keeps the libraries' progress bars out of a log of one line per event. They read this when they are imported; a
    variable that is set already is the user's choice."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows; quoted words are written into it.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; .png, .jpg or .webp. With --n, name-1.png and on.")
    ] = Path("out.png"),
    url: Annotated[str, typer.Option(envvar="GLIMMER_URL", help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="GLIMMER_API_KEY", help="The server's key, if it has one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="One of the server's model names.")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="How many pictures, 1..10.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, each 64..2048.")] = None,
    quality: Annotated[Quality | None, typer.Option(help="A name for a number of steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1..200; wins over --quality.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same picture.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt, 0..20.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Planner sampling, 0..2; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Planner sampling, above 0, at most 1.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Batch work waits for interactive work.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the server may take.")] = None,
    edit: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE", help="A picture to edit; may be given up to four times.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="PNG: where its alpha is 0, the first --edit may change.")] = None,
    partial_images: Annotated[
        int | None, typer.Option(help="Pictures on the way to each, 0..3, drawn in a terminal.")
    ] = None,
    partials: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Writes these pictures into a folder, too.")
    ] = None,
    plan_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Writes the plan, as JSON. With --n, name-1.json and on.")
    ] = None,
    plan_in: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A plan of the same size, to render without planning.")
    ] = None,
) -> None:
    """Asks a running server for pictures and writes them to files; Ctrl+C takes the request back."""
    if mask is not None and not edit:
        _stop("--mask goes with --edit: it says where the first picture may change")
    fields = {
        "prompt": prompt,
        "model": model,
        "n": n,
        "size": size,
        "quality": quality,
        "num_inference_steps": steps,
        "seed": seed,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
        "temperature": temperature,
        "top_p": top_p,
        "priority": priority,
        "timeout": timeout,
        "partial_images": PARTIAL_IMAGES if partials is not None and partial_images is None else partial_images,
    }
    try:
        body: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        body["output_format"] = client.format_of(output)
        if plan_in is not None:
            body["plan"] = client.read_plan(plan_in)
        task = client.Task(body, output, edit or [], mask, partials, plan_out)
        client.generate(url, api_key, task, Console())
    except client.GenerateError as error:
        typer.echo(f"glimmer: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, - and _.")]) -> None:
    """Makes an API key. It is shown once, on stderr; its table goes to stdout: glimmer key alice >> keys.toml"""
    from server.admission.keys import NAME, key_table, new_key

    if not NAME.fullmatch(name):
        _stop("a name has 1..64 letters, digits, - and _, and starts with a letter or a digit")
    made = new_key()
    typer.echo(f"The key of {name}; it is not kept anywhere:\n\n    {made}\n", err=True)
    typer.echo(key_table(name, made))


def main() -> None:
    """Entry point of the `glimmer` command."""
    app()
