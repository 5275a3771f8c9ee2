"""Progress and partial images of `glimmer generate`, shown in terminals only."""

import io
import json
from contextlib import suppress
from typing import Self

from PIL import Image as PillowImage
from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.text import Text

MAX_COLUMNS, MAX_LINES = 40, 20  # characters of a drawing
MARGIN = 4  # lines kept free


class Display:
    """A progress line and the latest partial image, removed in the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("waiting", total=None, count="")
        self._live = Live(self._progress, console=console, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show_progress(self, comment: str) -> None:
        """Show a state such as `queued {"position": 3}` or `running {"phase": "rendering", "step": 3, "steps": 20}`.

        Raises:
            ValueError, KeyError, TypeError: malformed; other comments are ignored.
        """
        state, _, text = comment.partition(" ")
        details = json.loads(text) if text else {}
        if state == "queued" and "position" in details:
            position = details["position"]
            description = f"waiting, {position} before it" if position else "waiting, next in line"
            self._progress.update(self._task, description=description)
        elif state == "running" and details:
            step, steps = details["step"], details["steps"]
            self._progress.update(
                self._task, description=details["phase"], total=steps, completed=step, count=f"{step}/{steps}"
            )

    def draw(self, image: bytes) -> None:
        """Replace the image shown; raise `OSError` if the bytes are not one."""
        if not self._console.is_terminal:
            return
        lines = max(1, min(MAX_LINES, self._console.height - MARGIN))
        self._live.update(Group(self._progress, half_blocks(image, min(MAX_COLUMNS, self._console.width), lines)))

    def print(self, text: str) -> None:
        """Print a line that stays; whatever stdout is, the files are written."""
        with suppress(OSError, SystemExit):  # rich exits if the reader has gone
            self._console.print(text, highlight=False, markup=False)


def half_blocks(data: bytes, columns: int, lines: int) -> Text:
    """Draw an image in characters of two roughly square pixels each, one above the other."""
    image = PillowImage.open(io.BytesIO(data)).convert("RGB")
    scale = min(columns / image.width, 2 * lines / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
    pixels = image.resize((width, 2 * height), PillowImage.Resampling.BOX).tobytes()
    drawing = Text(no_wrap=True)
    for line in range(height):
        for column in range(width):
            upper, lower = (pixels[3 * (row * width + column) :][:3] for row in (2 * line, 2 * line + 1))
            drawing.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        drawing.append("\n")
    return drawing
