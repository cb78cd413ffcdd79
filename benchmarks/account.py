"""What a step of the tiny network spends on curvature, part by part, in microseconds.

    python -m benchmarks.account [--steps 3000] [--write docs/cost.md]

Every part is timed in an ordinary training loop, where caches are as cold as they are there; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.curvature import WORKLOADS
from benchmarks.timing import write_table
from hesscale_lightning.curvature import attach, engine
from hesscale_lightning.curvature.compiled import CompiledPass


def timed(owner: Any, name: str, seconds: dict[str, list[float]], label: str) -> None:
    """Has every call of a method timed."""
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = plain(*args, **kwargs)
        seconds.setdefault(label, []).append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example docs/cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = WORKLOADS[0]
    model, x = workload.model(), workload.inputs()
    target = torch.randint(workload.classes, (len(x),))
    params = list(model.parameters())
    seconds: dict[str, list[float]] = {}

    def step(curvature: bool) -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]
        start = time.perf_counter()
        loss = F.cross_entropy(model(x), target)
        forward = time.perf_counter()
        if curvature:
            attach(loss, params)
        attached = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        kind = "with" if curvature else "without"
        seconds.setdefault("forward pass", []).append(forward - start)
        seconds.setdefault(f"attach {kind}", []).append(attached - forward)
        seconds.setdefault(f"backward {kind}", []).append(end - attached)

    for _ in range(5):
        step(True)
    # First the steps as they are, then the parts inside, as timing them costs time.
    for k in range(2 * args.steps):
        step(bool(k % 2))
    whole = {label: statistics.median(series) * 1e6 for label, series in seconds.items()}
    for structure in engine._structures._known.values():
        timed(structure, "match", seconds, "match")
    for name, label in (("arm", "hooks"), ("_advance", "program"), ("_write", "write")):
        timed(CompiledPass, name, seconds, label)
    for _ in range(args.steps):
        step(True)
    part = {label: statistics.median(seconds[label]) * 1e6 for label in ("match", "hooks", "program", "write")}
    attached, added = whole["attach with"], whole["backward with"] - whole["backward without"]
    rows = [
        ("forward + backward alone", whole["forward pass"] + whole["backward without"]),
        ("`attach`", attached),
        ("- follow the graph, compare, take saved tensors and signature", part["match"]),
        ("- hooks", part["hooks"]),
        ("- arguments, look-ups, the pass's own object", attached - part["match"] - part["hooks"]),
        ("added to `backward`", added),
        ("- the program's tensor operations", part["program"]),
        ("- write `p.hess_diag`", part["write"]),
        ("- hooks that run, beginning and end", added - part["program"] - part["write"]),
    ]
    table = "\n".join(["| part | microseconds |", "|---|---|", *[f"| {name} | {us:.0f} |" for name, us in rows]])
    print(table)
    if args.write:
        write_table(args.write, "account", table)


if __name__ == "__main__":
    main()
