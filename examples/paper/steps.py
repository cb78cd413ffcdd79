"""One step of training without its update, for every way to get curvature: what the studies of cost measure.

Each delivers ``p.grad`` and, but for the gradient alone, ``p.hess_diag``. What an estimate can share with the gradient
it shares: all but the exact diagonal make do with one forward pass.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from estimators import (
    RECURSIONS,
    Diagonals,
    Signals,
    exact,
    forward,
    ggn_of,
    kfac_of,
    signals_by_sampling,
    signals_of_ggn,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hesscale_lightning.curvature import attach

Step = Callable[[], None]
WARM_UP, ROUNDS = 2, 11  # rounds that do not count, and the fewest that do


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Time every step over the first's of the same round, all taking turns.

    It is the thread's own time: wall-clock time on an idle machine, and on a busy one without the waiting.

    Args:
        steps: the steps by name; the first is the baseline.
        seconds: how long to measure; at least eleven rounds are run.

    Returns:
        For each step the median and the quartiles of the ratio, and the median time in milliseconds.
    """
    rounds: list[list[float]] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rounds) < WARM_UP + ROUNDS:
            times = []
            for step in steps.values():
                start = time.thread_time()
                step()
                times.append(time.thread_time() - start)
            rounds.append(times)
            gc.collect(0)
    finally:
        gc.enable()
    found = {}
    for place, name in enumerate(steps):
        ratios = sorted(times[place] / times[0] for times in rounds[WARM_UP:])
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        milliseconds = 1000 * statistics.median(times[place] for times in rounds[WARM_UP:])
        found[name] = [statistics.median(ratios), low, high, milliseconds]
    return found


class Steps:
    """The steps of one network on one batch.

    Args:
        model: a sequence of layers.
        x: inputs of shape (size, ...).
        y: classes of shape (size,).
    """

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.params = [*model.parameters()]
        self.generator = torch.Generator().manual_seed(0)

    def named(self) -> dict[str, Step]:
        """Every step by its name, the gradient first."""
        return {
            "gradient": self.gradient,
            **{name: partial(self.recursion, method) for name, method in RECURSIONS.items()},
            "GGN, exact": partial(self.by_signals, ggn_of, signals_of_ggn),
            "GGN, 1 sample": partial(self.by_signals, ggn_of, partial(signals_by_sampling, 1)),
            "GGN, 50 samples": partial(self.by_signals, ggn_of, partial(signals_by_sampling, 50)),
            "K-FAC, 1 sample": partial(self.by_signals, kfac_of, partial(signals_by_sampling, 1)),
            "K-FAC, 50 samples": partial(self.by_signals, kfac_of, partial(signals_by_sampling, 50)),
            "Hutchinson, 1 probe": partial(self.hutchinson, 1),
            "Hutchinson, 50 probes": partial(self.hutchinson, 50),
            "squared gradient": self.squared_gradient,
            "exact diagonal": self.exact,
        }

    def clear(self) -> None:
        for p in self.params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def keep(self, diagonals: Diagonals) -> None:
        for p, diagonal in zip(self.params, diagonals, strict=True):
            p.hess_diag = diagonal  # type: ignore[attr-defined]

    def gradient(self) -> None:
        self.clear()
        cross_entropy(self.model(self.x), self.y).backward()

    def recursion(self, method: Any) -> None:
        self.clear()
        loss = cross_entropy(self.model(self.x), self.y)
        attach(loss, self.params, method=method)
        loss.backward()

    def by_signals(self, diagonal_of: Callable[..., Diagonals], signals: Signals) -> None:
        """The gradient's graph is used a second time, down to the layers' outputs only."""
        self.clear()
        logits, layers = forward(self.model, self.x.unsqueeze(0))
        cross_entropy(logits, self.y).backward(retain_graph=True)
        diagonals = diagonal_of(self.model, logits, layers, signals(logits, self.generator))
        self.keep([diagonal[0] for diagonal in diagonals])

    def hutchinson(self, probes: int) -> None:
        self.clear()
        loss = cross_entropy(self.model(self.x), self.y)
        gradients = torch.autograd.grad(loss, self.params, create_graph=True)
        total: Diagonals = []
        for probe in range(probes):
            signs = [torch.randint_like(p, 2) * 2 - 1 for p in self.params]
            products = torch.autograd.grad(gradients, self.params, signs, retain_graph=probe < probes - 1)
            found = torch._foreach_mul(signs, products)
            total = torch._foreach_add(total, found) if total else found
        self.keep(torch._foreach_div(total, probes) if probes > 1 else total)
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient.detach()

    def squared_gradient(self) -> None:
        self.gradient()
        self.keep(torch._foreach_mul(*[[p.grad for p in self.params]] * 2))  # type: ignore[arg-type]

    def exact(self) -> None:
        self.gradient()
        diagonals = exact(self.model, self.x.unsqueeze(0), self.y.unsqueeze(0), self.generator)
        self.keep([diagonal[0] for diagonal in diagonals])
