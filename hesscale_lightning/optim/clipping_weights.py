"""Gradient clipping as weights of the batches in AdaHesScale's running averages.

A batch whose gradient was clipped by the factor c enters the gradient average as c g and the curvature average as
(c h)^2, or c |h|. Divided by the same averages of c, and of c^2 or c, these are weighted averages of what backward
delivered. A constant factor cancels; an unusual batch counts less, in both.
"""

from typing import Any

from torch import Tensor

from hesscale_lightning.optim.tensor_lists import beside, never_compiled

CLIPPING_KEY = "clipping_average"
NO_CLIPPING = (0.0, 0.0, 0.0, 0.0)  # sums for the gradient and the curvature average: of factors, of plain weights


@never_compiled
def clipping_weights(
    group: dict[str, Any], clipping: float | Tensor, *, refreshing: bool
) -> tuple[float | Tensor, float | Tensor]:
    """Take one more clipping factor into a param group's averages of them.

    Args:
        group: the param group; its entry ``clipping_average`` is replaced.
        clipping: factor by which this step's gradients were clipped.
        refreshing: whether the step brought new diagonals.

    Returns:
        The averages for the gradient and for the curvature; both 1 as long as nothing was clipped.
    """
    beta1, beta2 = group["betas"]
    grad_sum, grad_weight, hess_sum, hess_weight = group[CLIPPING_KEY]
    grad_sum = beta1 * beside(grad_sum, clipping) + (1 - beta1) * clipping
    grad_weight = beta1 * grad_weight + (1 - beta1)
    if refreshing:
        weight = clipping**2 if group["denominator"] == "rms" else clipping
        hess_sum = beta2 * beside(hess_sum, clipping) + (1 - beta2) * weight
        hess_weight = beta2 * hess_weight + (1 - beta2)
    group[CLIPPING_KEY] = (grad_sum, grad_weight, hess_sum, hess_weight)
    if isinstance(hess_weight, Tensor):  # in a program that is being captured
        return grad_sum / grad_weight, (hess_sum / hess_weight).where(hess_weight > 0, 1.0)
    return grad_sum / grad_weight, hess_sum / hess_weight if hess_weight else 1.0
