"""Score the plans of a planner under training, in a minute and without images.

    python -m benchmarks.nano_plans --work out/nano                   the state in a folder of `make train-nano`
    python -m benchmarks.nano_plans --start models/nano/checkpoint    the weights of a checkpoint

The sets are those of `nano_quality`. A row has the share of plans of 256x256 in which each is as the prompt says:
background, lines (zone, length, first letter, bar), shapes, and every cell. With `--seeds N` each prompt is planned N
times, and "varies" is the share of open facts with several values.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.nano_scores import SETS, Case, fact_value
from models.nano.recipe import planning
from models.nano.recipe.continuation import load_planner
from models.nano.recipe.loop import trained
from models.nano.recipe.planner import TrainedPlanner
from models.nano.recipe.tokenizer import make_tokenizer

PROPERTIES = ("background", "lines", "shapes", "whole")
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="folder with planner.pt")
    source.add_argument("--start", type=Path, help="checkpoint folder")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--prompts", type=int, default=100, help="at most so many of each set (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="plans of each prompt (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--wrong", action="store_true", help="list the prompts with a wrong plan")
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    model = TrainedPlanner(tokenizer)
    if arguments.work:
        model.load_state_dict(trained(arguments.work, "planner"))
    else:
        load_planner(model, tokenizer, arguments.start)
    table = Table("set", *PROPERTIES, "varies", title="% of plans")
    for name in arguments.sets:
        cases_of, usual = SETS[name]
        cases = cases_of(usual, 0)[: arguments.prompts]
        plans = [
            np.concatenate([
                planning.sample_plans(
                    model, lambda text: tokenizer.backend_tokenizer.encode(text).ids,
                    [case.prompt for case in cases[i : i + BATCH]], 8, 8, seed, arguments.temperature, arguments.top_p,
                )
                for i in range(0, len(cases), BATCH)
            ])
            for seed in range(arguments.seeds)
        ]  # fmt: skip
        counts, wrong = score(cases, plans)
        shares = [f"{100 * counts[p] / len(cases) / arguments.seeds:.1f}" for p in PROPERTIES]
        table.add_row(name, *shares, f"{100 * counts['varies'] / max(1, counts['open']):.0f}")
        if arguments.wrong:
            print(*wrong, sep="\n")
    Console().print(table)


def score(cases: Sequence[Case], plans: Sequence[np.ndarray]) -> tuple[Counter[str], list[str]]:
    """Return counts by property, and what is wrong. `plans` are [seed][case]."""
    counts, wrong = Counter[str](), []
    for index, case in enumerate(cases):
        found = [planning.poster_of(of_seed[index]) for of_seed in plans]
        for of_seed in plans:
            checks = planning.check(of_seed[index], case.facts)
            counts.update(name for name, right in checks.items() if right)
            if not checks["whole"]:
                wrong.append(f"{' '.join(name for name, right in checks.items() if not right)}: {case.prompt!r}")
        counts["open"] += len(case.open)
        counts["varies"] += sum(len({fact_value(poster, fact) for poster in found}) > 1 for fact in case.open)
    return counts, wrong


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
