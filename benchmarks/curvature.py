"""Cost of curvature: forward + backward + HesScale over forward + backward, one thread, in one run.

    python -m benchmarks.curvature [--seconds 4] [--only mlp] [--json FILE]

Beside it stands what the Hutchinson estimate of AdaHessian costs with one probe (a Hessian-vector product with a random
sign vector), and the peak memory of torch's allocator in each case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Ratio, peak_bytes, ratios
from hesscale_lightning.curvature import attach


@dataclass(frozen=True)
class Workload:
    """A network, a batch and its loss, and the most that curvature is to cost."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int
    target: float


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


WORKLOADS = [
    Workload("tanh MLP 17-64-64-6, batch 64", lambda: mlp(17, 64, 64, 6), lambda: torch.randn(64, 17), 6, 1.70),
    Workload(
        "ReLU MLP 17-64-64-6, batch 64", lambda: mlp(17, 64, 64, 6, act=nn.ReLU), lambda: torch.randn(64, 17), 6, 1.70
    ),
    Workload(
        "tanh MLP 784-128-128-10, batch 32", lambda: mlp(784, 128, 128, 10), lambda: torch.randn(32, 784), 10, 1.75
    ),
    Workload(
        "tanh MLP 1024-1024-1024-1024-10, batch 256",
        lambda: mlp(1024, 1024, 1024, 1024, 10),
        lambda: torch.randn(256, 1024),
        10,
        1.75,
    ),
    Workload("CNN 3x32x32, three convolutions, batch 64", cnn, lambda: torch.randn(64, 3, 32, 32), 10, 1.75),
]


def variants(workload: Workload) -> dict[str, Callable[[], None]]:
    """One step without its update, for each way to get curvature; the first is the plain one."""
    torch.manual_seed(0)
    model = workload.model()
    x = workload.inputs()
    target = torch.randint(workload.classes, (len(x),))
    params = [p for p in model.parameters() if p.requires_grad]

    def clear() -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def gradient() -> None:
        clear()
        F.cross_entropy(model(x), target).backward()

    def curvature(method: Any) -> Callable[[], None]:
        def step() -> None:
            clear()
            loss = F.cross_entropy(model(x), target)
            attach(loss, params, method=method)
            loss.backward()

        return step

    def hutchinson() -> None:
        clear()
        gradients = torch.autograd.grad(F.cross_entropy(model(x), target), params, create_graph=True)
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in params]
        products = torch.autograd.grad(gradients, params, signs)
        for p, g, z, product in zip(params, gradients, signs, products, strict=True):
            p.grad = g.detach()
            p.hess_diag = z * product  # type: ignore[attr-defined]

    return {
        "gradient": gradient,
        "hesscale": curvature("hesscale"),
        "hesscale_gn": curvature("hesscale_gn"),
        "hutchinson": hutchinson,
    }


def measure(workload: Workload, seconds: float) -> dict[str, Any]:
    steps = variants(workload)
    timed = dict(zip(steps, ratios(list(steps.values()), seconds), strict=True))
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    return {"workload": workload.name, "target": workload.target, "time": timed, "memory": memory}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| network | gradient | HesScale | to reach | HesScaleGN | Hutchinson, 1 probe "
        "| peak memory: HesScale | Hutchinson |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        time: dict[str, Ratio] = result["time"]
        memory = result["memory"]
        lines.append(
            f"| {result['workload']} | {time['gradient'].baseline_us / 1000:.2f} ms | {time['hesscale']} "
            f"| {result['target']:.2f} | {time['hesscale_gn']} | {time['hutchinson']} "
            f"| {memory['hesscale'] / memory['gradient']:.2f} | {memory['hutchinson'] / memory['gradient']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each network")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(w, args.seconds) for w in WORKLOADS if args.only in w.name]
    print(
        "Time and peak memory over those of forward + backward; median (quartiles) of interleaved rounds, one thread.\n"
    )
    print(table(results))
    if args.json:
        plain = [{**r, "time": {k: vars(v) for k, v in r["time"].items()}} for r in results]
        args.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
