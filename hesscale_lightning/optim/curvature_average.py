"""The running average of curvature that AdaHesScale divides by and StepSizeScaling measures steps with.

For a diagonal h and n refreshes so far (a refresh is a step that brought a new diagonal):

==========  ===========================  ==========================
denominator running average v            curvature D
==========  ===========================  ==========================
"rms"       average of h^2               sqrt(v / (1 - beta^n))
"abs"       average of |h|               v / (1 - beta^n)
"sqrt_abs"  average of |h|               v / (1 - beta^n)
==========  ===========================  ==========================

Averages are exponential, v <- beta v + (1 - beta) h^2, and start at zero. They decay only when they are refreshed, so
the bias correction counts refreshes and not steps. "sqrt_abs" differs from "abs" only in what the gradient is divided
by.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from hesscale_lightning.optim.tensor_lists import as_operand

Denominator = Literal["rms", "abs", "sqrt_abs"]
DENOMINATORS: tuple[str, ...] = get_args(Denominator)


def refresh_averages(
    averages: list[Tensor],
    diagonals: list[Tensor],
    beta: float,
    denominator: str,
    factor: float | Tensor = 1.0,
    *,
    foreach: bool,
) -> None:
    """Move the running averages towards new diagonals, in place.

    Args:
        averages: running averages v, one per parameter.
        diagonals: new diagonals h of the same shapes and dtypes; not changed.
        beta: decay rate.
        denominator: "rms", "abs" or "sqrt_abs".
        factor: multiplies every diagonal (see :mod:`hesscale_lightning.optim.gradient_rescaling`).
        foreach: use multi-tensor kernels; all tensors must then share one device and dtype.
    """
    if not averages:
        return
    if not foreach:
        for average, diagonal in zip(averages, diagonals, strict=True):
            _refresh_one(average, diagonal, beta, denominator, factor)
        return
    if isinstance(factor, Tensor):
        diagonals, factor = list(torch._foreach_mul(diagonals, factor)), 1.0
    if denominator == "rms":
        torch._foreach_mul_(averages, as_operand(beta, averages[0]))
        torch._foreach_addcmul_(averages, diagonals, diagonals, (1 - beta) * factor**2)
    else:
        magnitudes = torch._foreach_abs(diagonals)
        if factor != 1.0:
            torch._foreach_mul_(magnitudes, factor)
        torch._foreach_lerp_(averages, magnitudes, 1 - beta)


def _refresh_one(average: Tensor, diagonal: Tensor, beta: float, denominator: str, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        diagonal, factor = diagonal * factor, 1.0
    if denominator == "rms":
        average.mul_(beta).addcmul_(diagonal, diagonal, value=(1 - beta) * factor**2)
    else:
        magnitude = diagonal.abs()
        if factor != 1.0:
            magnitude.mul_(factor)
        average.lerp_(magnitude, 1 - beta)
