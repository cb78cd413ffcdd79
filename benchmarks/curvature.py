"""Cost of curvature: forward + backward + HesScale over forward + backward, one thread, in one run.

    python -m benchmarks.curvature [--seconds 4] [--only MLP] [--json FILE] [--write README.md]

Beside it stand a compiled step (`compile_step`: forward, backward and HesScale as one program) over the same eager
gradient and over a compiled one, what the Hutchinson estimate of AdaHessian costs with one probe (a Hessian-vector
product with a random sign vector), and the peak memory of torch's allocator.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Ratio, peak_bytes, ratios, with_progress, write_table
from hesscale_lightning import compile_step
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


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(
            64, 4, 128, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


WORKLOADS = [
    Workload("tanh MLP 17-64-64-6, batch 64", lambda: mlp(17, 64, 64, 6), lambda: torch.randn(64, 17), 6, 1.55),
    Workload(
        "ReLU MLP 17-64-64-6, batch 64", lambda: mlp(17, 64, 64, 6, act=nn.ReLU), lambda: torch.randn(64, 17), 6, 1.52
    ),
    Workload(
        "tanh MLP 784-128-128-10, batch 32", lambda: mlp(784, 128, 128, 10), lambda: torch.randn(32, 784), 10, 1.55
    ),
    Workload(
        "tanh MLP 1024-1024-1024-1024-10, batch 256",
        lambda: mlp(1024, 1024, 1024, 1024, 10),
        lambda: torch.randn(256, 1024),
        10,
        1.58,
    ),
    Workload("CNN 3x32x32, three convolutions, batch 64", cnn, lambda: torch.randn(64, 3, 32, 32), 10, 1.47),
    Workload("ResNet 3x32x32 with BatchNorm, batch 32", resnet, lambda: torch.randn(32, 3, 32, 32), 10, 1.70),
    Workload(
        "transformer, two layers of width 64, 32 tokens, batch 16",
        Transformer,
        lambda: torch.randint(100, (16, 32)),
        10,
        1.95,
    ),
    Workload("GRU of width 64, 20 steps, batch 32", Recurrent, lambda: torch.randn(32, 20, 16), 10, 1.90),
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
        """Without fused attention, which torch does not differentiate twice."""
        clear()
        with sdpa_kernel(SDPBackend.MATH):
            two_passes()

    def two_passes() -> None:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), target), params, create_graph=True)
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in params]
        products = torch.autograd.grad(gradients, params, signs)
        for p, g, z, product in zip(params, gradients, signs, products, strict=True):
            p.grad = g.detach()
            p.hess_diag = z * product  # type: ignore[attr-defined]

    def compiled(method: Any) -> Callable[[], None]:
        program = compile_step(model, F.cross_entropy, method=method, silent=True, on_failure="raise")

        def step() -> None:
            clear()
            program(x, target)

        return step

    return {
        "gradient": gradient,
        "hesscale": curvature("hesscale"),
        "hesscale_gn": curvature("hesscale_gn"),
        "compiled": compiled("hesscale"),
        "compiled gradient": compiled(None),
        "hutchinson": hutchinson,
    }


def measure(workload: Workload, seconds: float) -> dict[str, Any]:
    steps = variants(workload)
    timed = dict(zip(steps, ratios(list(steps.values()), seconds), strict=True))
    timed["over compiled"] = ratios([steps["compiled gradient"], steps["compiled"]], seconds / 2)[1]
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    return {"workload": workload.name, "target": workload.target, "time": timed, "memory": memory}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| network | gradient | HesScale | to reach | HesScaleGN | compiled step over eager gradient "
        "| over compiled gradient | Hutchinson, 1 probe | peak memory: HesScale | Hutchinson |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        time: dict[str, Ratio] = result["time"]
        memory = result["memory"]
        lines.append(
            f"| {result['workload']} | {time['gradient'].baseline_us / 1000:.2f} ms | {time['hesscale']} "
            f"| {result['target']:.2f} | {time['hesscale_gn']} | {time['compiled']} "
            f"| {time['over compiled'].median:.2f} | {time['hutchinson']} "
            f"| {memory['hesscale'] / memory['gradient']:.2f} | {memory['hutchinson'] / memory['gradient']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each network")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(w, args.seconds) for w in with_progress(w for w in WORKLOADS if args.only in w.name)]
    print(
        "Time and peak memory over those of forward + backward; median (quartiles) of interleaved rounds, one thread.\n"
    )
    print(table(results))
    if args.write:
        write_table(args.write, "curvature", table(results))
    if args.json:
        plain = [{**r, "time": {k: vars(v) for k, v in r["time"].items()}} for r in results]
        args.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
