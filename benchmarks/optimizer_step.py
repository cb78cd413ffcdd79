"""Cost of an optimizer's step: AdaHesScale and step-size scaling beside torch's Adam, one thread, in one run.

    python -m benchmarks.optimizer_step [--seconds 4] [--json FILE] [--write docs/cost.md]

Gradients and diagonals are there already; what is timed is ``step`` and, for our optimizers, what their hooks on two
parameters do during backward. "AdaHesScale, no trust region" is
``delta=None``. The refresh column is a step without a new diagonal, as most are with curvature every 10 steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Ratio, ratios, with_progress, write_table
from hesscale_lightning.optim import AdaHesScale, StepSizeScaling

NETWORKS: dict[str, list[int]] = {
    "MLP 17-64-64-6": [17, 64, 64, 6],
    "1M parameters (784-700-600-50)": [784, 700, 600, 50],
}
VARIANTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam (foreach)": lambda params: torch.optim.Adam(params, foreach=True),
    "AdaHesScale, no trust region": lambda params: AdaHesScale(params, delta=None),
    "AdaHesScale": lambda params: AdaHesScale(params),
    "AdaHesScale, foreach=False": lambda params: AdaHesScale(params, foreach=False),
    "AdaHesScale, no new diagonal": lambda params: AdaHesScale(params),
    "StepSizeScaling(Adam)": lambda params: StepSizeScaling(torch.optim.Adam(params, foreach=True)),
}
# The most that a step is to cost: 1.15 of Adam's, and 0.3 more with the trust region.
TARGETS = {"AdaHesScale, no trust region": 1.15, "AdaHesScale": 1.45}


def stepper(sizes: list[int], name: str) -> Callable[[], None]:
    """A function that hands out the diagonals and steps."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    diagonals = [torch.rand(p.shape, generator=generator) for p in params]
    optimizer = VARIANTS[name](params)
    refresh_always = name != "AdaHesScale, no new diagonal"
    started = False

    def step() -> None:
        nonlocal started
        if refresh_always or not started:
            for p, h in zip(params, diagonals, strict=True):
                p.hess_diag = h  # type: ignore[attr-defined]
            started = True
        if isinstance(optimizer, AdaHesScale | StepSizeScaling):
            optimizer.record_gradients()
        optimizer.step()

    return step


def rows(seconds: float = 4.0) -> Iterator[tuple[str, str, Ratio]]:
    """Network, optimizer, and its time over Adam's."""
    for network, sizes in with_progress(NETWORKS.items()):
        timed = ratios([stepper(sizes, name) for name in VARIANTS], seconds, warm_up=20)
        for name, ratio in zip(VARIANTS, timed, strict=True):
            yield network, name, ratio


def table(results: Sequence[tuple[str, str, Ratio]]) -> str:
    lines = ["| parameters | optimizer | step | over Adam | to reach |", "|---|---|---|---|---|"]
    for network, name, ratio in results:
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        lines.append(f"| {network} | {name} | {ratio.variant_us / 1000:.2f} ms | {ratio} | {target} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each network")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example docs/cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = list(rows(args.seconds))
    print("Time of a step over that of torch.optim.Adam; median (quartiles) of interleaved rounds, one thread.\n")
    print(table(results))
    if args.write:
        write_table(args.write, "optimizer", table(results))
    if args.json:
        plain = [{"network": network, "optimizer": name, **vars(ratio)} for network, name, ratio in results]
        args.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
