"""Run the chaos campaign against real processes; print figures and goals, exit with 1 if a goal is not met."""

import argparse
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from tests.chaos.campaign import SCENARIOS, run
from tests.chaos.report import Figure, print_table
from tests.chaos.sizes import SHORT, Sizes


def main() -> int:
    arguments = _parser().parse_args()
    default = SHORT if arguments.short else Sizes()
    options = {size.name: getattr(arguments, size.name) for size in fields(Sizes)}
    sizes = Sizes(**{name: getattr(default, name) if value is None else value for name, value in options.items()})
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="glimmer-chaos-") as temporary:
        for name in arguments.scenario or SCENARIOS:
            began = time.monotonic()
            figures += run(name, (arguments.folder or Path(temporary)) / name, arguments.seed, sizes)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print_table(figures, Console())
    return int(any(figure.held is False for figure in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, help="scenario to run, may be repeated; default: all"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of requests and faults")
    parser.add_argument("--folder", type=Path, help="empty folder in which to keep logs and journals")
    parser.add_argument("--short", action="store_true", help="use the sizes of the test suite")
    for size in fields(Sizes):
        full, short = getattr(Sizes(), size.name), getattr(SHORT, size.name)
        flag = f"--{size.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(full), help=f"{full:g}; short: {short:g}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
