"""Training loop of every part: seeded, resumable, with a progress bar."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from time import monotonic

import torch
from torch import Tensor, nn
from tqdm import tqdm

Losses = Mapping[str, Tensor | float]
SAVE_EVERY_S = 60.0
REPORT_EVERY = 50
IGNORED = -100  # the label that cross entropy leaves out


def device() -> torch.device:
    """Return the device to train on: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """Return a context with bfloat16 matrix products."""
    return torch.autocast(device().type, torch.bfloat16)


def trained(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the state of a trained part, averaged if it was."""
    state = torch.load(folder / f"{name}.pt", map_location=device())
    return state["module"] | (state["average"] or {})


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            self.values[name].lerp_(p, 1 - decay)


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int, Random], tuple[Tensor, Losses]],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    average: float | None = None,
    seed: int = 0,
) -> None:
    """Train `module` in place for `steps` steps, or resume an earlier run.

    Args:
        name: seeds every step; the state is kept in `folder/name.pt`.
        loss_of: (step, seeded random numbers) -> (loss, figures).
        average: decay of a moving average of the weights, which is the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    mean = Average(module, average) if average else None
    start = 0
    if path.exists():
        state = torch.load(path, map_location=parameters[0].device)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        if mean and state["average"]:
            mean.values = state["average"]

    def save(step: int) -> None:
        state = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "average": mean and mean.values,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    saved = monotonic()
    for step in bar:
        rate = learning_rate * min(1.0, (step + 1) / warmup) * max(0.02, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((seed << 32) + step)
        loss, named = loss_of(step, Random(f"{name}/{seed}/{step}"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if mean:
            mean.update(module, step)
        for key, value in named.items():
            sums[key] = sums.get(key, 0.0) + float(value)
            counts[key] = counts.get(key, 0) + 1
        if (step + 1) % REPORT_EVERY == 0:
            figures = " ".join(f"{k} {v / counts[k]:.4g}" for k, v in sums.items())
            bar.set_postfix_str(figures)
            if not os.isatty(2):
                print(f"\n{name} {step + 1} {figures}", flush=True)
            sums, counts = {}, {}
        if monotonic() - saved > SAVE_EVERY_S:
            save(step + 1)
            saved = monotonic()
    if start < steps:
        save(steps)
    if mean:
        module.load_state_dict(module.state_dict() | mean.values)
