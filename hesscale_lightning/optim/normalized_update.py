"""From running averages to the normalised update of AdaHesScale, by multi-tensor kernels or tensor by tensor.

With m the gradient average, v the curvature average, and b1, b2 the sums of the weights in them::

    u = clamp( (m / b1) / (root(v / b2) + eps), -max_update, max_update )

where root is the square root ("rms", "sqrt_abs") or the identity ("abs"). Relative damping adds a floor to v / b2
("sqrt_abs") or to its root, which is a fraction of the group's mean curvature. Without clipping, b1 = 1 - beta1^t and
b2 = 1 - beta2^n are Adam's bias corrections; clipped batches have smaller weights (see ``clipping_weights``). The
trust region also needs ``sum D u^2``. Its D is the curvature damped by eps, as in the denominator: the denominator
itself, or its square for "sqrt_abs".

When b1 and b2 are numbers on the host, they are not applied to the tensors but folded into eps, the clamp and one
factor: ``u = gain * clamp(m / (root(v) + eps c), max_update / gain)`` with ``c = root(b2)`` and ``gain = c / b1``. That
saves two passes over memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.optim.sharded import total
from hesscale_lightning.optim.tensor_lists import (
    as_operand,
    beside,
    inner_product,
    large_on_cpu,
    norm_square,
    sum_of_scalars,
)


@dataclass(slots=True)
class Batch:
    """Tensors of one param group that are updated together: same device, dtype and counts.

    Attributes:
        params: the parameters, or of sharded ones the parts of this process.
        holders: the parameters themselves, which hold gradients.
        where: over what they are split between processes, None if they are not.
        grad_averages: exponential averages of the gradient.
        curvature_averages: exponential averages of the curvature.
        steps: number of steps t as scalar tensors, one per parameter.
        refreshes: number of steps n that brought a new diagonal, as scalar tensors, one per parameter.
        counts: (t, n) where they are known on the host and equal for the whole batch, else None.
    """

    params: list[Tensor] = field(default_factory=list)
    grad_averages: list[Tensor] = field(default_factory=list)
    curvature_averages: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    refreshes: list[Tensor] = field(default_factory=list)
    counts: tuple[float, float] | None = None
    holders: list[Tensor] = field(default_factory=list)
    where: Any = None


class UpdateRule(NamedTuple):
    """The hyperparameters of the normalised update, of one param group.

    ``clipping`` holds the averages by which clipping has changed the weights of m and of v, (1, 1) without clipping.
    ``floor`` is added to the curvature, in its units.
    """

    beta1: float
    beta2: float
    eps: float
    denominator: str
    max_update: float | None
    measure_curvature: bool
    clipping: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    floor: float | Tensor = 0.0


class Update(NamedTuple):
    """The normalised update ``gain * directions``, and its ``sum D u^2`` (0 if it was not asked for)."""

    directions: list[Tensor]
    gain: float
    curvature_along: float | Tensor


def normalized_update(
    batch: Batch, rule: UpdateRule, *, foreach: bool, buffers: dict[Tensor, Tensor] | None = None
) -> Update:
    """Compute the update of one batch; nothing in the batch is changed.

    Args:
        batch: what to update.
        rule: the hyperparameters.
        foreach: use multi-tensor kernels.
        buffers: holds the directions of large CPU tensors between calls, by parameter. Memory fresh from the system is
            slower than the arithmetic there; accelerators have an allocator that keeps it.

    On the CPU large tensors are visited one by one in either case: multi-tensor kernels loop there as well, and keeping
    one denominator alive at a time instead of all of them halved the time at a million parameters.
    """
    grad_clipping, curvature_clipping = rule.clipping
    eps: float | Tensor = rule.eps
    floor = beside(rule.floor, batch.params[0])
    if batch.counts is None or isinstance(grad_clipping, Tensor) or isinstance(curvature_clipping, Tensor):
        gain, unit = 1.0, 1.0
        steps, refreshes = batch.counts or (batch.steps, batch.refreshes)
        m = _corrected(batch.grad_averages, rule.beta1, steps, grad_clipping)
        v = _corrected(batch.curvature_averages, rule.beta2, refreshes, curvature_clipping)
    else:
        weight = (1 - rule.beta2 ** batch.counts[1]) * curvature_clipping
        root = weight if rule.denominator == "abs" else weight**0.5
        eps, gain = rule.eps * root, root / ((1 - rule.beta1 ** batch.counts[0]) * grad_clipping)
        unit = (gain / root) ** 2 if rule.denominator == "sqrt_abs" else gain**2 / root
        m, v = batch.grad_averages, batch.curvature_averages
        floor = floor * (root if rule.denominator == "rms" else weight)
    if rule.denominator != "sqrt_abs":
        eps, floor = eps + floor, 0.0
    bound = None if rule.max_update is None else rule.max_update / gain
    large = large_on_cpu(m)
    if foreach and not large:
        directions, along = _foreach(m, v, eps, floor, bound, rule)
    else:
        reuse = buffers is not None and large and not torch.compiler.is_compiling()
        out = _reserve(buffers, batch.params, m) if buffers is not None and reuse else None
        directions, along = _one_by_one(m, v, eps, floor, bound, rule, out)
    return Update(directions, gain, along * unit)


def mean_curvature(batches: Sequence[Batch], rule: UpdateRule) -> float | Tensor:
    """The mean of the curvature over all entries of a group; the root of the mean square for "rms"."""
    whole: float | Tensor = 0.0
    entries = 0
    for batch in batches:
        v = batch.curvature_averages
        clipping = beside(rule.clipping[1], v[0])
        if batch.counts is None:
            part = sum_of_scalars([x.sum() for x in _corrected(v, rule.beta2, batch.refreshes, clipping)])
        else:
            part = sum_of_scalars([x.sum() for x in v]) / ((1 - rule.beta2 ** batch.counts[1]) * clipping)
        part = total(part, batch.where)
        whole = beside(whole, part) + beside(part, whole)
        entries += sum(p.numel() for p in batch.holders)
    mean = whole / max(entries, 1)
    return mean**0.5 if rule.denominator == "rms" else mean


def average_norm_square(batches: Sequence[Batch], rule: UpdateRule) -> float | Tensor:
    """Squared norm of a group's average gradient, corrected for its start and for clipping."""
    whole: float | Tensor = 0.0
    for batch in batches:
        clipping = beside(rule.clipping[0], batch.grad_averages[0])
        if batch.counts is None:
            part = norm_square(_corrected(batch.grad_averages, rule.beta1, batch.steps, clipping))
        else:
            part = norm_square(batch.grad_averages) / ((1 - rule.beta1 ** batch.counts[0]) * clipping) ** 2
        part = total(part, batch.where)
        whole = beside(whole, part) + beside(part, whole)
    return whole


def _is_something(floor: float | Tensor) -> bool:
    return isinstance(floor, Tensor) or floor != 0.0


def _corrected(
    averages: list[Tensor], beta: float, counts: float | list[Tensor], clipping: float | Tensor
) -> list[Tensor]:
    """Averages divided by the sum of their weights, where that sum stays on the device."""
    clipping = beside(clipping, averages[0])
    if isinstance(counts, float):
        return [average / ((1 - beta**counts) * clipping) for average in averages]
    if beta == 0:
        return [average / clipping for average in averages]
    # expm1, because 1 - beta^n in float32 would lose four digits for n = 1 and beta = 0.999
    return [
        average / (-torch.expm1(count * math.log(beta)) * clipping)
        for average, count in zip(averages, counts, strict=True)
    ]


def _reserve(buffers: dict[Tensor, Tensor], params: list[Tensor], likes: list[Tensor]) -> list[Tensor]:
    for param, like in zip(params, likes, strict=True):
        if param not in buffers or buffers[param].dtype != like.dtype or buffers[param].shape != like.shape:
            buffers[param] = torch.empty_like(like)
    return [buffers[param] for param in params]


def _one_by_one(
    averages: list[Tensor],
    curvatures: list[Tensor],
    eps: float | Tensor,
    floor: float | Tensor,
    bound: float | None,
    rule: UpdateRule,
    out: list[Tensor] | None,
) -> tuple[list[Tensor], float | Tensor]:
    rooted = rule.denominator != "abs"
    offset = as_operand(eps, averages[0])
    damped = _is_something(floor)
    directions = []
    terms: list[Tensor] = []
    for index, (m, v) in enumerate(zip(averages, curvatures, strict=True)):
        room = None if out is None else out[index]
        first = None if rule.measure_curvature else room  # the denominator may be overwritten by the update
        if not rooted:
            d = torch.add(v, offset, out=first)
        elif damped:
            d = torch.add(v, floor, out=first).sqrt_().add_(offset)
        else:
            d = torch.sqrt(v, out=first).add_(offset)
        u = torch.div(m, d, out=room if rule.measure_curvature else d)
        if bound is not None:
            u.clamp_(-bound, bound)
        directions.append(u)
        if rule.measure_curvature:
            d.mul_(u)
            terms.append(inner_product(d, d if rule.denominator == "sqrt_abs" else u))
    return directions, sum_of_scalars(terms)


def _foreach(
    averages: list[Tensor],
    curvatures: list[Tensor],
    eps: float | Tensor,
    floor: float | Tensor,
    bound: float | None,
    rule: UpdateRule,
) -> tuple[list[Tensor], float | Tensor]:
    offset = as_operand(eps, averages[0])
    if rule.denominator == "abs":
        d = torch._foreach_add(curvatures, offset)
    else:
        if _is_something(floor):
            d = torch._foreach_add(curvatures, floor)
            torch._foreach_sqrt_(d)
        else:
            d = torch._foreach_sqrt(curvatures)
        torch._foreach_add_(d, offset)
    u = torch._foreach_div(averages, d)
    if bound is not None:
        torch._foreach_clamp_max_(u, bound)
        torch._foreach_clamp_min_(u, -bound)
    if not rule.measure_curvature:
        return list(u), 0.0
    torch._foreach_mul_(d, u)
    torch._foreach_mul_(d, d if rule.denominator == "sqrt_abs" else u)
    return list(u), sum_of_scalars(torch._foreach_norm(d, 1))
