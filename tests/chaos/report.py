"""Figures against goals, as a table; the campaign's exit code."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

WIDTH = 120


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Args:
        goal: in words; empty for what is only told.
        held: whether the figure meets it; None for what is only told.
        timed: it says how fast something was, which a busy machine may spoil.
    """

    scenario: str
    name: str
    value: str
    goal: str = ""
    held: bool | None = None
    timed: bool = False


class Report:
    """The figures of one scenario, as they come."""

    def __init__(self, scenario: str):
        self._scenario = scenario
        self.figures: list[Figure] = []

    def tell(self, name: str, value: object) -> None:
        self.figures.append(Figure(self._scenario, name, _text(value)))

    def hold(self, name: str, value: object, goal: str, held: bool, *, timed: bool = False) -> None:
        """A figure that has a goal."""
        self.figures.append(Figure(self._scenario, name, _text(value), goal, held, timed))

    def none(self, name: str, found: "list[str] | set[str]") -> None:
        """What must not be; the first few are named."""
        few = f"{len(found)}: {', '.join(sorted(found)[:3])}" if found else "0"
        self.hold(name, few, "0", not found)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_table(figures: list[Figure], console: Console) -> None:
    table = Table(title="chaos", title_justify="left")
    for column in ("scenario", "figure", "measured", "goal", ""):
        table.add_column(column, overflow="fold")
    last = ""
    for figure in figures:
        verdict = {True: "held", False: "[bold red]BROKEN[/]", None: ""}[figure.held]
        if last and figure.scenario != last:
            table.add_section()
        table.add_row(
            figure.scenario if figure.scenario != last else "", figure.name, figure.value, figure.goal, verdict
        )
        last = figure.scenario
    console.width = max(console.width, WIDTH)  # a log has no width
    console.print(table)
