"""Three ways to curvature at a network's output, where paths from it meet again: error and cost.

    python -m benchmarks.output [--seconds 3] [--write docs/exactness.md]

A policy network 17-64-64 and PPO's loss with entropy bonus, a minibatch of 64. *Separate paths* carries curvature down
each path by itself; *composites* is what the engine does; *double backward* differentiates the head twice, one column
of its Hessian after the other. Each is timed for the whole step, gradient and diagonals of all parameters included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from benchmarks.timing import ratios, write_table
from hesscale_lightning.curvature import attach, backward, exact_hess_diag
from hesscale_lightning.curvature.composite import Joiner
from hesscale_lightning.curvature.engine import _structures

BATCH, INPUTS, ACTIONS = 64, 17, 6


class Policy(nn.Module):
    def __init__(self, gaussian: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, ACTIONS)
        )
        self.log_std = nn.Parameter(torch.zeros(ACTIONS)) if gaussian else None

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)] if self.log_std is None else [self.body(x), self.log_std]


def loss_of(outputs: list[Tensor], data: dict[str, Tensor]) -> Tensor:
    distribution: Any
    if len(outputs) == 1:
        distribution, action = Categorical(logits=outputs[0]), data["class"]
    else:
        mean, log_std = outputs
        distribution, action = Independent(Normal(mean, torch.ones_like(mean) * log_std.exp()), 1), data["action"]
    log_prob = distribution.log_prob(action)
    ratio = torch.exp(log_prob - log_prob.detach() + data["shift"])
    surrogate = torch.min(ratio * data["advantage"], ratio.clamp(0.8, 1.2) * data["advantage"])
    return -surrogate.mean() - 0.01 * distribution.entropy().mean()


class separate_paths:
    def __enter__(self) -> None:
        self.ending_in = Joiner.ending_in
        Joiner.ending_in = lambda *_: None  # type: ignore[method-assign, assignment]
        _structures.clear()

    def __exit__(self, *_: object) -> None:
        Joiner.ending_in = self.ending_in  # type: ignore[method-assign]
        _structures.clear()


def measure(gaussian: bool, seconds: float) -> list[str]:
    torch.manual_seed(0)
    policy = Policy(gaussian)
    params = list(policy.parameters())
    x = torch.randn(BATCH, INPUTS)
    data = {
        "class": torch.randint(ACTIONS, (BATCH,)),
        "action": torch.randn(BATCH, ACTIONS),
        "advantage": torch.randn(BATCH),
        "shift": 0.3 * torch.randn(BATCH),
    }

    def clear() -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def gradient() -> None:
        clear()
        loss_of(policy(x), data).backward()

    def composites() -> None:
        clear()
        loss = loss_of(policy(x), data)
        attach(loss, params)
        loss.backward()

    def double_backward() -> None:
        """The head's Hessian blocks, then the recursion from the network's output on."""
        clear()
        outputs = policy(x)
        loss = loss_of(outputs, data)
        heads = torch.autograd.grad(loss, outputs, create_graph=True)
        diagonals = []
        for output, head in zip(outputs, heads, strict=True):
            columns = [
                torch.autograd.grad(head[..., k].sum(), output, retain_graph=True)[0][..., k]
                for k in range(output.shape[-1])
            ]
            diagonals.append(torch.stack(columns, -1))
        surrogate = sum(
            (g.detach() * o + 0.5 * h * (o - o.detach()) ** 2).sum()
            for o, g, h in zip(outputs, heads, diagonals, strict=True)
        )
        assert isinstance(surrogate, Tensor)
        backward(surrogate, params)

    def error() -> float:
        outputs = [o.detach().double().requires_grad_() for o in policy(x)]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
        exact = exact_hess_diag(loss_of(outputs, wide), outputs)
        backward(loss_of(outputs, wide), outputs)
        wrong = sum(float((o.hess_diag - e).abs().sum()) for o, e in zip(outputs, exact, strict=True))  # type: ignore[attr-defined]
        return wrong / sum(float(e.abs().sum()) for e in exact)

    rows = []
    variants: dict[str, Callable[[], None]] = {"composites": composites, "double backward": double_backward}
    timed = dict(zip(["gradient", *variants], ratios([gradient, *variants.values()], seconds), strict=True))
    exact_error = error()
    with separate_paths():
        naive_error = error()
        naive = ratios([gradient, composites], seconds)[1]
    name = "Gaussian, 6 actions" if gaussian else "categorical, 6 actions"
    rows.append(f"| {name} | separate paths | {naive_error:.2g} | {naive} |")
    rows.append(f"| {name} | composites | {exact_error:.1g} | {timed['composites']} |")
    rows.append(f"| {name} | double backward | 0 | {timed['double backward']} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure each policy")
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example docs/exactness.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| policy | mechanism | relative L1 error at the output | step over gradient-only step |",
        "|---|---|---|---|",
        *measure(False, args.seconds),
        *measure(True, args.seconds),
    ]
    print("\n".join(lines))
    if args.write:
        write_table(args.write, "output", "\n".join(lines))


if __name__ == "__main__":
    main()
