"""What a person at a terminal sees while a picture is made. Elsewhere nothing of it is printed."""

import io
import json
from typing import Self

from PIL import Image as PillowImage
from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.text import Text

MAX_COLUMNS, MAX_LINES = 40, 20  # of a drawing
MARGIN = 4  # lines of the terminal that are left to everything else


class Display:
    """A line of progress and under it the latest partial image; gone when it is left."""

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

    def tell(self, comment: str) -> None:
        """Shows what a comment in the stream says: a state and JSON, `queued {"position": 3}` or
        `running {"phase": "rendering", "step": 3, "steps": 20}`. Any other is passed over.

        Raises:
            ValueError, KeyError, TypeError: it only looks like one of these.
        """
        state, _, facts = comment.partition(" ")
        known = json.loads(facts) if facts else {}
        if state == "queued" and "position" in known:
            ahead = f"waiting, {known['position']} before it" if known["position"] else "waiting, next in line"
            self._progress.update(self._task, description=ahead)
        elif state == "running" and known:
            step, steps = known["step"], known["steps"]
            self._progress.update(
                self._task, description=known["phase"], total=steps, completed=step, count=f"{step}/{steps}"
            )

    def draw(self, picture: bytes) -> None:
        """Shows a picture in place of the one before.

        Raises:
            OSError: it is none.
        """
        if not self._console.is_terminal:
            return
        lines = max(1, min(MAX_LINES, self._console.height - MARGIN))
        self._live.update(Group(self._progress, half_blocks(picture, min(MAX_COLUMNS, self._console.width), lines)))

    def print(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, highlight=False, markup=False)


def half_blocks(picture: bytes, columns: int, lines: int) -> Text:
    """The picture in at most that much room: a character is two pixels, one above the other, about square each."""
    image = PillowImage.open(io.BytesIO(picture)).convert("RGB")
    scale = min(columns / image.width, 2 * lines / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
    data = image.resize((width, 2 * height), PillowImage.Resampling.BOX).tobytes()
    drawing = Text(no_wrap=True)
    for line in range(height):
        for column in range(width):
            upper, lower = (data[3 * (row * width + column) :][:3] for row in (2 * line, 2 * line + 1))
            drawing.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        drawing.append("\n")
    return drawing
