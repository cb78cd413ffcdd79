"""The trust region of the quadratic model, and what a step looked like in it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.optim.sharded import whole


def trust_region_scale(delta: float, curvature_along: float | Tensor, longest: float = 1.0) -> float | Tensor:
    """The factor ``min(longest, sqrt(2 delta / sum(D u^2)))`` that keeps ``sum(D u^2) / 2 <= delta``.

    Args:
        delta: radius, in units of the loss.
        curvature_along: ``sum(D u^2)`` of the step u that is about to be made.
        longest: bound of the factor.

    Returns:
        A float if ``curvature_along`` is one, else a scalar tensor. It is 1 where there is no curvature, and where the
        sum is not a number, which would otherwise spread from one entry to all.
    """
    if isinstance(curvature_along, Tensor):
        scale = (2 * delta / curvature_along).sqrt().clamp(max=longest)
        return scale.where(curvature_along > 0, 1.0)
    return min(longest, math.sqrt(2 * delta / curvature_along)) if curvature_along > 0 else 1.0


def predicted_decrease(
    grads: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    curvature_along: Any,
    clipping: float | Tensor = 1.0,
    places: Sequence[Any] | None = None,
) -> Tensor | None:
    """How far the quadratic model falls along a step: ``-(sum(g u) + sum(D u^2) / 2)``.

    Args:
        grads: gradients g; None as an entry makes the answer None.
        steps: what was added to the parameters, u.
        curvature_along: ``sum(D u^2)``.
        clipping: factor by which the gradients were multiplied, to be undone.
        places: over what each tensor is split between processes; see :func:`.sharded.layout`.
    """
    if not steps or any(grad is None for grad in grads):
        return None
    terms = [(g.to(step.dtype) * step).sum() for g, step in zip(grads, steps, strict=True) if g is not None]
    decrease: Tensor = -(whole(terms, places) / clipping + curvature_along / 2)
    return decrease


def mean_abs(steps: Sequence[Tensor], places: Sequence[Any] | None = None) -> Tensor:
    """Mean absolute value over all entries of several tensors, which ``places`` says are split between processes."""
    entries = [torch.tensor(float(step.numel()), device=step.device) for step in steps]
    return whole([step.abs().sum() for step in steps], places) / whole(entries, places)


def flatten_statistics(per_group: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """One dictionary of scalar tensors: plain names for a single group, ``name/index`` for several."""
    flat = {}
    for index, statistics in enumerate(per_group):
        for name, value in statistics.items():
            key = name if len(per_group) == 1 else f"{name}/{index}"
            flat[key] = torch.as_tensor(value).detach()
    return flat
