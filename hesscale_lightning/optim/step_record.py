"""What AdaHesScale remembers of a step, and what it says about it when asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.optim.normalized_update import Batch, UpdateRule, normalized_update
from hesscale_lightning.optim.sharded import local, total
from hesscale_lightning.optim.tensor_lists import beside
from hesscale_lightning.optim.trust_region import mean_abs, predicted_decrease


@dataclass(slots=True)
class StepRecord:
    """The latest step of one param group. It refers to parameters and averages, and copies none of them.

    Attributes:
        batches: what was updated.
        rule: how the normalised update was computed.
        size: what the normalised update was multiplied by, learning rate and trust region.
        scale: the trust region's factor alone.
        along: ``sum D u^2`` of the normalised update, where there is a trust region.
        clipping: the factor by which gradients had been clipped.
        foreach: whether multi-tensor kernels were used.
        maximize: whether the objective is maximised.
        signal: the part of a measured region that the step was to take; see ``CalibratedRadius``.
    """

    batches: Sequence[Batch]
    rule: UpdateRule
    size: float | Tensor
    scale: float | Tensor
    along: float | Tensor
    clipping: float | Tensor
    foreach: bool
    maximize: bool
    signal: float | Tensor = 1.0


@torch.no_grad()
def describe(record: StepRecord) -> dict[str, Any]:
    """Statistics of a step, by computing its update once more from the averages, which have not changed since."""
    statistics: dict[str, Any] = {"scale": record.scale, "clipping": record.clipping}
    grads: list[Tensor | None] = []
    steps: list[Tensor] = []
    places: list[Any] = []
    along: float | Tensor = 0.0
    for batch in record.batches:
        size = beside(record.size, batch.params[0])
        update = normalized_update(batch, record.rule._replace(measure_curvature=True), foreach=record.foreach)
        steps += [direction * (-size * update.gain) for direction in update.directions]
        for p in batch.holders:
            grad = None if p.grad is None else local(p.grad)
            grads.append(-grad if record.maximize and grad is not None else grad)
            places.append(batch.where)
        part = total(update.curvature_along, batch.where)
        along = along + beside(part * size * size, along)
    if steps:
        statistics["mean_abs_update"] = mean_abs(steps, places)
        decrease = predicted_decrease(grads, steps, along, record.clipping, places)
        if decrease is not None:
            statistics["predicted_decrease"] = decrease
    return statistics
