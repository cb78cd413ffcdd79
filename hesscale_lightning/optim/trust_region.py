"""The trust region of the quadratic model, and what a step looked like in it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def trust_region_scale(delta: float, curvature_along: float | Tensor) -> float | Tensor:
    """The factor ``min(1, sqrt(2 delta / sum(D u^2)))`` that keeps ``sum(D u^2) / 2 <= delta``.

    Args:
        delta: radius, in units of the loss.
        curvature_along: ``sum(D u^2)`` of the step u that is about to be made.

    Returns:
        A float if ``curvature_along`` is one, else a scalar tensor. It is 1 where there is no curvature, and where the
        sum is not a number, which would otherwise spread from one entry to all.
    """
    if isinstance(curvature_along, Tensor):
        scale = (2 * delta / curvature_along).sqrt().clamp(max=1.0)
        return scale.where(curvature_along > 0, 1.0)
    return min(1.0, math.sqrt(2 * delta / curvature_along)) if curvature_along > 0 else 1.0


def predicted_decrease(
    grads: Sequence[Tensor | None], steps: Sequence[Tensor], curvature_along: Any, clipping: float | Tensor = 1.0
) -> Tensor | None:
    """How far the quadratic model falls along a step: ``-(sum(g u) + sum(D u^2) / 2)``.

    Args:
        grads: gradients g; None as an entry makes the answer None.
        steps: what was added to the parameters, u.
        curvature_along: ``sum(D u^2)``.
        clipping: factor by which the gradients were multiplied, to be undone.
    """
    total: Tensor | None = None
    for grad, step in zip(grads, steps, strict=True):
        if grad is None:
            return None
        term = (grad.to(step.dtype) * step).sum()
        total = term if total is None else total + term.to(total.device)
    return None if total is None else -(total / clipping + curvature_along / 2)


def mean_abs(steps: Sequence[Tensor]) -> Tensor:
    """Mean absolute value over all entries of several tensors."""
    device = steps[0].device
    total = torch.stack([step.abs().sum().to(device) for step in steps]).sum()
    return total / sum(step.numel() for step in steps)


def flatten_statistics(per_group: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """One dictionary of scalar tensors: plain names for a single group, ``name/index`` for several."""
    flat = {}
    for index, statistics in enumerate(per_group):
        for name, value in statistics.items():
            key = name if len(per_group) == 1 else f"{name}/{index}"
            flat[key] = torch.as_tensor(value).detach()
    return flat
