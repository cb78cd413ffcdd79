"""What the logging callback says about a step.

Diagonals are consumed by the optimizer's step, gradients are added to by losses of other networks, and no callback of
Stable-Baselines3 runs within ``train()``. So a step is looked at right before and right after it is made, and only if
somebody asked since the last one: once per rollout, not once per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CurvatureStatistics:
    """Statistics of the first step of each optimizer after every :meth:`request`."""

    def __init__(self) -> None:
        self._values: dict[Optimizer, list[dict[str, Tensor]]] = {}
        self._told: dict[Optimizer, dict[str, Tensor]] = {}
        self._looking_at: Any = None
        self.requested = False
        self._answered: set[Optimizer] = set()

    def request(self) -> None:
        """Asks for the next step of every optimizer."""
        self.requested = True
        self._answered.clear()

    def awaits(self, optimizer: Optimizer) -> bool:
        """Whether the diagonals of this optimizer's next step are to be looked at."""
        return self.requested and optimizer not in self._answered

    @torch.no_grad()
    def take(self, optimizer: Optimizer) -> None:
        """Looks at the diagonals that wait for this optimizer's step, if that was asked for."""
        if self.awaits(optimizer):
            self._answered.add(optimizer)
            self._values[optimizer] = [_describe(group) for group in optimizer.param_groups]
            self._looking_at = optimizer

    def take_what_was_done(self, optimizer: Any) -> None:
        """Notes what the optimizer says of the step that it has just made, if its diagonals were looked at."""
        if self._looking_at is optimizer:
            self._looking_at = None
            self._told[optimizer] = optimizer.stats

    def told_by(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What the optimizer said of that step; empty where nothing is known."""
        return self._told.get(optimizer, {})

    def of(self, optimizer: Optimizer) -> list[dict[str, Tensor]]:
        """Of the diagonals in that step, a dictionary for each param group; empty where nothing is known."""
        return self._values.get(optimizer, [{} for _ in optimizer.param_groups])


def _describe(group: dict[str, Any]) -> dict[str, Tensor]:
    diagonals = [h.flatten() for p in group["params"] if (h := getattr(p, "hess_diag", None)) is not None]
    if not diagonals:
        return {}
    h = torch.cat(diagonals)
    return {
        "curvature_mean_abs": h.abs().mean(),
        "curvature_max_abs": h.abs().max(),
        "curvature_trace": h.sum(),
        "curvature_negative_fraction": (h < 0).to(h.dtype).mean(),
    }
