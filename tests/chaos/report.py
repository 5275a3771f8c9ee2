"""Figures and goals as a table."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

WIDTH = 120


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Args:
        goal: in words; empty if there is none.
        held: whether the goal is met; None without a goal.
        timed: whether it is a duration, which a busy machine may lengthen.
    """

    scenario: str
    name: str
    value: str
    goal: str = ""
    held: bool | None = None
    timed: bool = False


class Report:
    """The figures of one scenario."""

    def __init__(self, scenario: str):
        self._scenario = scenario
        self.figures: list[Figure] = []

    def note(self, name: str, value: object) -> None:
        self.figures.append(Figure(self._scenario, name, _text(value)))

    def check(self, name: str, value: object, goal: str, held: bool, *, timed: bool = False) -> None:
        """Add a figure with a goal."""
        self.figures.append(Figure(self._scenario, name, _text(value), goal, held, timed))

    def check_none(self, name: str, found: "list[str] | set[str]") -> None:
        """Add a figure with the goal 0; the first few of `found` are named."""
        value = f"{len(found)}: {', '.join(sorted(found)[:3])}" if found else "0"
        self.check(name, value, "0", not found)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_table(figures: list[Figure], console: Console) -> None:
    table = Table(title="chaos", title_justify="left")
    for column in ("scenario", "figure", "measured", "goal", ""):
        table.add_column(column, overflow="fold")
    previous = ""
    for figure in figures:
        verdict = {True: "met", False: "[bold red]MISSED[/]", None: ""}[figure.held]
        if previous and figure.scenario != previous:
            table.add_section()
        table.add_row(
            figure.scenario if figure.scenario != previous else "", figure.name, figure.value, figure.goal, verdict
        )
        previous = figure.scenario
    console.width = max(console.width, WIDTH)  # a log has no width
    console.print(table)
