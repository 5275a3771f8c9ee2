"""`glimmer generate`: its options, and the request made of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.jobs.job import Priority
from engine.quotes import QuoteRule
from server.cli.options import stop
from server.requests.quality import Quality

DEFAULT_PARTIAL_IMAGES = 2  # with --partials alone

# The parameters of `generate` that are fields of the request.
_FIELDS = (
    *("prompt", "model", "n", "size", "quality", "num_inference_steps", "seed", "guidance_scale", "negative_prompt"),
    *("quotes", "temperature", "top_p", "priority", "timeout", "partial_images"),
)


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the image shows; quoted words are written into it.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write: .png, .jpg or .webp; with --n name-1.png, ...")
    ] = Path("out.png"),
    url: Annotated[str, typer.Option(envvar="GLIMMER_URL", help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="GLIMMER_API_KEY", help="Key for the server, if it asks for one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="One of the server's model names.")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Number of images, 1..10.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, each 64..2048.")] = None,
    quality: Annotated[Quality | None, typer.Option(help="Name of a number of steps.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps, 1..200; overrides --quality.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same image.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", help="How closely to follow the prompt, 0..20.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    quotes: Annotated[
        QuoteRule | None, typer.Option(help="strict takes no apostrophes for quotation marks; default reference.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Planner sampling, 0..2; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Planner sampling, above 0, at most 1.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Batch jobs wait for interactive ones.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the server may take.")] = None,
    edit: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE", help="Source image of an edit; up to four times.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="PNG; the first --edit may change where its alpha is 0.")] = None,
    partial_images: Annotated[
        int | None, typer.Option(help="Partial images of each image, 0..3, drawn in a terminal.")
    ] = None,
    partials: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write partial images to.")] = None,
    plan_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write the plan to as JSON; with --n name-1.json, ...")
    ] = None,
    plan_in: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan of the same size, to render without planning.")
    ] = None,
) -> None:
    """Request images from a running server and write them to files; Ctrl+C cancels the request."""
    from rich.console import Console

    from server.cli import client

    if mask is not None and not edit:
        stop("--mask goes with --edit: it says where the first source image may change")
    body: dict[str, Any] = {name: context.params[name] for name in _FIELDS if context.params[name] is not None}
    if partials is not None:
        body.setdefault("partial_images", DEFAULT_PARTIAL_IMAGES)
    try:
        body["output_format"] = client.format_of(output)
        if plan_in is not None:
            body["plan"] = client.read_plan(plan_in)
        client.generate(url, api_key, client.Task(body, output, edit or [], mask, partials, plan_out), Console())
    except client.GenerateError as error:
        stop(str(error), 1)
