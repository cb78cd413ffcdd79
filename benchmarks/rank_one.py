"""Cost of ``method="hesscale_rank1"`` beside HesScale's: whole steps, interleaved in one process, one thread.

    python -m benchmarks.rank_one [--seconds 8] [--only MLP] [--write docs/rank_one.md]

A step is forward, backward and curvature, without an optimizer's update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.curvature import WORKLOADS, Workload
from benchmarks.timing import Ratio, peak_bytes, ratios, with_progress, write_table
from hesscale_lightning.curvature import attach

#: The most that the refined estimate's step is to take, over HesScale's.
TARGETS = {"tanh MLP 17-64-64-6, batch 64": 1.15, "ReLU MLP 17-64-64-6, batch 64": 1.15}


def step(workload: Workload) -> Callable[[Any], Callable[[], None]]:
    """From a method (None: the gradient alone) to one step with it, without its update."""
    torch.manual_seed(0)
    model, x = workload.model(), workload.inputs()
    target = torch.randint(workload.classes, (len(x),))
    params = list(model.parameters())

    def by(method: Any) -> Callable[[], None]:
        def run() -> None:
            for p in params:
                p.grad = p.hess_diag = None  # type: ignore[attr-defined]
            loss = F.cross_entropy(model(x), target)
            if method is not None:
                attach(loss, params, method=method)
            loss.backward()

        return run

    return by


def measure(workload: Workload, seconds: float) -> tuple[Ratio, Ratio, Ratio, float]:
    """The refined step over HesScale's, both over the gradient alone, and the refined peak memory over HesScale's."""
    by = step(workload)
    gradient, plain, refined = by(None), by("hesscale"), by("hesscale_rank1")
    _, over_plain = ratios([plain, refined], seconds)
    _, of_plain, of_refined = ratios([gradient, plain, refined], seconds / 2)
    return over_plain, of_plain, of_refined, peak_bytes(refined) / peak_bytes(plain)


def table(rows: list[tuple[Workload, tuple[Ratio, Ratio, Ratio, float]]]) -> str:
    lines = [
        "| network | over HesScale | to reach | HesScale over the gradient alone | refined over the gradient alone "
        "| peak memory over HesScale's |",
        "|---|---|---|---|---|---|",
    ]
    for workload, (over_plain, of_plain, of_refined, memory) in rows:
        target = TARGETS.get(workload.name, 1.10)
        lines.append(f"| {workload.name} | {over_plain} | {target:.2f} | {of_plain} | {of_refined} | {memory:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to measure each network")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--write", type=Path, help="also replace the table in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [(w, measure(w, args.seconds)) for w in with_progress(w for w in WORKLOADS if args.only in w.name)]
    print(table(rows))
    if args.write:
        write_table(args.write, "rank_one", table(rows))


if __name__ == "__main__":
    main()
