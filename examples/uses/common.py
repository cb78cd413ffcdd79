"""What the comparisons of the diagonal's uses share: the tools of the paper's studies, training, and paired counts."""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).resolve().parents[1] / "paper"))  # journal, pictures and tasks of the studies
sys.path.append(str(Path(__file__).resolve().parents[2]))  # benchmarks
from optimization import Data

BATCH = 64
QUANTILES = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}  # of Student's t: 95 % for that many seeds


def train(
    model: nn.Module,
    data: Data,
    steps: int,
    lr: float,
    seed: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> None:
    """Adam with a linear decay to zero."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step, index in enumerate(data.batches(steps, BATCH, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_fn(model(data.x[index]), data.y[index]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Training loss and test accuracy, in evaluation mode."""
    model.eval()
    loss = cross_entropy(model(data.x), data.y).item()
    right = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
    return loss, right


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t."""
    if len(values) < 2:
        return values[0], float("inf")
    quantile = QUANTILES[len(values)]
    return statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def verdict(differences: Sequence[float]) -> str:
    """Whether paired differences are above 0, below it, or neither, by their 95 % interval."""
    mean, half = interval(differences)
    if mean - half > 0:
        return "higher"
    return "lower" if mean + half < 0 else "undecided"


def machine(environment: dict[str, Any]) -> str:
    return f"one thread, torch {environment['torch']}, {environment['machine']}"
