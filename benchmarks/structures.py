"""Cost of curvature where the graph's structure changes: first steps, stochastic depth, sequences of many lengths.

    python -m benchmarks.structures [--seconds 4] [--write docs/cost.md]

A structure's first step runs the rules, its second writes the program, later ones run it. ``first`` and ``second`` are
those steps over an ordinary one, each with an empty cache. The other rows are forward + backward + HesScale over
forward + backward in a loop whose graphs differ from step to step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.curvature import WORKLOADS
from benchmarks.timing import ratios, with_progress, write_table
from hesscale_lightning.curvature import attach, engine


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class StochasticDepth(nn.Module):
    """Twelve blocks, each left out with probability one half: 4,096 structures, so that few come again."""

    def __init__(self, width: int = 64, blocks: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)
        self.random = random.Random(0)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        if self.step % 2:  # the two steps of a round are the same
            self.kept = [self.random.random() < 0.5 for _ in self.blocks]
        for block, kept in zip(self.blocks, self.kept, strict=True):
            if kept:
                x = block(x)
        return self.head(x)


class Unrolled(nn.Module):
    """A GRU cell, unrolled over as many steps as the sequence has."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 32)
        self.head = nn.Linear(32, 10)
        self.lengths = lengths
        self.random = random.Random(0)
        self.step = 0

    def next_length(self) -> int:
        """The same for both steps of a round."""
        self.step += 1
        return self.lengths[self.step // 2 % len(self.lengths)]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 32)
        for t in range(self.next_length()):
            h = self.cell(x[:, t], h)
        return self.head(h)


class RandomLengths(Unrolled):
    def next_length(self) -> int:
        self.step += 1
        if self.step % 2:
            self.length = self.random.choice(self.lengths)
        return self.length


LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "stochastic depth, 12 blocks of width 64": (StochasticDepth, lambda: torch.randn(32, 64)),
    "GRU cell unrolled, one length": (lambda: Unrolled([10]), lambda: torch.randn(16, 64, 8)),
    "GRU cell unrolled, 8 lengths in turn": (lambda: Unrolled(list(range(4, 20, 2))), lambda: torch.randn(16, 64, 8)),
    "GRU cell unrolled, 32 lengths at random": (
        lambda: RandomLengths(list(range(4, 36))),
        lambda: torch.randn(16, 64, 8),
    ),
}


def steps_of(model: nn.Module, x: Tensor, classes: int) -> list[Callable[[], None]]:
    target = torch.randint(classes, (len(x),))
    params = list(model.parameters())

    def clear() -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def gradient() -> None:
        clear()
        F.cross_entropy(model(x), target).backward()

    def curvature() -> None:
        clear()
        loss = F.cross_entropy(model(x), target)
        attach(loss, params)
        loss.backward()

    return [gradient, curvature]


def first_steps(step: Callable[[], None], rounds: int) -> tuple[float, float]:
    """The first and the second step over an ordinary one."""
    seconds: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        engine._structures.clear()
        for kind in (0, 1, 2, 2, 2, 2):
            start = time.perf_counter()
            step()
            seconds[kind].append(time.perf_counter() - start)
    first, second, ordinary = (statistics.median(s) for s in seconds)
    return first / ordinary, second / ordinary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each loop")
    parser.add_argument("--write", type=Path, help="also replace the table in this page, for example docs/cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| network | first step, over an ordinary one | second step |", "|---|---|---|"]
    for workload in with_progress(WORKLOADS):
        torch.manual_seed(0)
        _, step = steps_of(workload.model(), workload.inputs(), workload.classes)
        first, second = first_steps(step, 15)
        lines.append(f"| {workload.name} | {first:.1f} | {second:.1f} |")
    lines += ["", "| loop | HesScale over the gradient |", "|---|---|"]
    for name, (make, inputs) in with_progress(LOOPS.items()):
        torch.manual_seed(0)
        timed: list[Any] = ratios(steps_of(make(), inputs(), 10), args.seconds)
        lines.append(f"| {name} | {timed[1]} |")
    table = "\n".join(lines)
    print(table)
    if args.write:
        write_table(args.write, "structures", table)


if __name__ == "__main__":
    main()
