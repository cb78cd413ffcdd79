"""Cost of a compiled training step over the eager one, one thread, in one run.

    python -m benchmarks.compiled_step [--seconds 4] [--only MLP] [--json FILE] [--write docs/compiled_step.md]

The *gradient* is forward and backward, eagerly and without curvature. A *compiled step* is forward, backward and curvature
as `compile_step` runs it, with what it does around its program; the *compiled gradient* is the same with `method=None`.
A *training step* is all of that and the update: eagerly with Adam, and compiled with AdaHesScale in the program. *Making
it* is what capturing and compiling the step took here, with Inductor's cache empty, and once more with what that left in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.curvature import WORKLOADS as ALL
from benchmarks.curvature import Workload
from benchmarks.timing import Ratio, peak_bytes, ratios, write_table
from hesscale_lightning import AdaHesScale, attach, compile_step
from hesscale_lightning.compiled_step import Step


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 15 * 15, 10))


#: Networks, and what the compiled step is to cost over the eager gradient; NaN where nothing was asked.
WORKLOADS: list[tuple[Workload, float]] = [
    (ALL[0], 0.55),
    (ALL[2], 0.85),
    (Workload("CNN 3x32x32, one convolution, batch 16", small_cnn, lambda: torch.randn(16, 3, 32, 32), 10, 0.0), 0.85),
    (ALL[4], float("nan")),
    (ALL[7], 1.2),
    (ALL[6], 1.3),
]


@contextmanager
def inductor_cache(folder: str) -> Iterator[None]:
    """Inductor finds and leaves its work in ``folder``."""
    import os

    from torch._inductor.utils import clear_caches

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    clear_caches()
    try:
        yield
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def measure(workload: Workload, target: float, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = workload.model()
    x, y = workload.inputs(), torch.randint(workload.classes, (workload.inputs().shape[0],))
    params = list(model.parameters())
    trained = workload.model()  # of its own, so that the optimizers' hooks cost the others nothing
    adam, adahesscale = torch.optim.Adam(trained.parameters(), lr=1e-5), AdaHesScale(trained.parameters(), lr=1e-5)
    curvature = compile_step(model, F.cross_entropy, silent=True, on_failure="raise")
    gradient = compile_step(model, F.cross_entropy, method=None, silent=True, on_failure="raise")
    training = compile_step(trained, F.cross_entropy, optimizer=adahesscale, silent=True, on_failure="raise")

    def clear() -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def eager() -> None:
        clear()
        F.cross_entropy(model(x), y).backward()

    def eager_curvature() -> None:
        clear()
        loss = F.cross_entropy(model(x), y)
        attach(loss, params)
        loss.backward()

    def compiled(step: Step) -> Callable[[], None]:
        def run() -> None:
            clear()
            step(x, y)

        return run

    def eager_training() -> None:
        adam.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        adam.step()

    def made() -> float:
        start = time.perf_counter()
        curvature.clear()
        curvature(x, y)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, inductor_cache(folder):
        cold = made()
        warm = made()
        steps = {
            "gradient": eager,
            "eager curvature": eager_curvature,
            "compiled": compiled(curvature),
            "compiled gradient": compiled(gradient),
        }
        timed = dict(zip(steps, ratios(list(steps.values()), seconds), strict=True))
        over_compiled = ratios([steps["compiled gradient"], steps["compiled"]], seconds / 2)[1]
        whole = ratios([eager_training, lambda: training(x, y)], seconds / 2)[1]
        memory = {name: peak_bytes(step) for name, step in steps.items()}
    return {
        "workload": workload.name,
        "target": target,
        "time": timed,
        "over compiled": over_compiled,
        "training": whole,
        "cold": cold,
        "warm": warm,
        "memory": memory,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| network | gradient | eager step over gradient | compiled step over gradient | to reach "
        "| over compiled gradient | training step with AdaHesScale over eager one with Adam "
        "| peak memory over gradient | making it, empty cache | later |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        timed: dict[str, Ratio] = result["time"]
        memory = result["memory"]
        target = f"{result['target']:.2f}" if result["target"] == result["target"] else ""
        lines.append(
            f"| {result['workload']} | {timed['gradient'].baseline_us / 1000:.2f} ms | {timed['eager curvature'].median:.2f} "
            f"| {timed['compiled']} | {target} | {result['over compiled']} | {result['training']} "
            f"| {memory['compiled'] / memory['gradient']:.2f} | {result['cold']:.0f} s | {result['warm']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each network")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("Median (quartiles) of interleaved rounds, one thread.\n")
    results = []
    for workload, target in WORKLOADS:
        if args.only in workload.name:
            results.append(measure(workload, target, args.seconds))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if args.write:
        write_table(args.write, "compiled_step", table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=vars) + "\n")


if __name__ == "__main__":
    main()
