r"""What a step did: its effective learning rate, and the fall of the loss it promised and brought.

Write :math:`u` for what was added to the parameters, :math:`g` for the gradient and :math:`h` for the diagonal:

========================  =================================================================
effective learning rate   :math:`\sum |u_i| / \sum |g_i|`: that of the SGD step of equal length
predicted decrease        :math:`-(\sum g_i u_i + \frac12 \sum h_i u_i^2)`: the quadratic model's
gain ratio                actual over predicted decrease: near 1 where the model is right
========================  =================================================================
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.metrics.base import CurvatureMetric, paired, total


def effective_learning_rate(steps: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """Mean absolute step over mean absolute gradient.

    Args:
        steps: what was added to each parameter.
        gradients: each parameter's gradient, of the same shape.

    Returns:
        A scalar tensor; not finite where all gradients are 0.

    Raises:
        ValueError: if there is no step, or the shapes differ.

    Example:
        >>> effective_learning_rate([torch.tensor([0.1, -0.3])], [torch.tensor([-1.0, 3.0])])
        tensor(0.1000)
    """
    pairs = paired(steps, gradients, ("steps", "gradients"))
    return total([u.abs().sum() for u, _ in pairs]) / total([g.abs().sum() for _, g in pairs])


def predicted_decrease(gradients: Iterable[Tensor], diagonals: Iterable[Tensor], steps: Iterable[Tensor]) -> Tensor:
    """How far the quadratic model of gradient and diagonal falls along a step; negative where it rises.

    Args:
        gradients: each parameter's gradient.
        diagonals: each parameter's diagonal, of the same shape.
        steps: what was added to each parameter.

    Returns:
        A scalar tensor in units of the loss.

    Raises:
        ValueError: if there is no step, or the shapes differ.

    Example:
        >>> predicted_decrease([torch.tensor([2.0])], [torch.tensor([4.0])], [torch.tensor([-0.5])])
        tensor(0.5000)
    """
    steps = list(steps)
    slopes = paired(gradients, steps, ("gradients", "steps"))
    bends = paired(diagonals, steps, ("diagonals", "steps"))
    return -total([(g * u).sum() + 0.5 * (h * u * u).sum() for (g, u), (h, _) in zip(slopes, bends, strict=True)])


class EffectiveLearningRate(CurvatureMetric):
    """:func:`effective_learning_rate` over all updates.

    Example:
        >>> metric = EffectiveLearningRate()
        >>> metric.update([torch.tensor([0.1, -0.3])], [torch.tensor([-1.0, 3.0])])
        >>> metric.compute()
        tensor(0.1000)
    """

    moved: Tensor
    slope: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moved", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("slope", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, steps: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
        """Add one step."""
        pairs = paired(steps, gradients, ("steps", "gradients"))
        self.moved += total([u.abs().sum() for u, _ in pairs])
        self.slope += total([g.abs().sum() for _, g in pairs])

    def compute(self) -> Tensor:
        """The effective learning rate."""
        return self.moved / self.slope


class LossDecrease(CurvatureMetric):
    """Predicted and actual decrease of the loss, averaged over updates, and their ratio.

    Example:
        >>> metric = LossDecrease()
        >>> metric.update(predicted=torch.tensor(0.4), actual=torch.tensor(0.3))
        >>> metric.update(predicted=torch.tensor(0.2), actual=torch.tensor(0.15))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'predicted_decrease': 0.3, 'actual_decrease': 0.225, 'gain_ratio': 0.75}
    """

    predicted: Tensor
    actual: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("predicted", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("actual", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("updates", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Add one step: what the model promised, and the loss before it less the loss after it."""
        self.predicted += predicted
        self.actual += actual
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Both means, and the ratio of the actual to the predicted."""
        return {
            "predicted_decrease": self.predicted / self.updates,
            "actual_decrease": self.actual / self.updates,
            "gain_ratio": self.actual / self.predicted,
        }


class StepSizeScale(CurvatureMetric):
    """Mean factor by which the trust region multiplied the steps, and the share of steps that it shortened.

    Example:
        >>> metric = StepSizeScale()
        >>> for scale in (1.0, 0.5):
        ...     metric.update(torch.tensor(scale))
        >>> metric.compute()
        {'scale': tensor(0.7500), 'shortened': tensor(0.5000)}
    """

    total: Tensor
    shortened: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("shortened", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("updates", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scale: Tensor) -> None:
        """Add one step's factor, ``optimizer.stats["scale"]``."""
        self.total += scale
        self.shortened += scale < 1
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """The mean factor and the share of shortened steps."""
        return {"scale": self.total / self.updates, "shortened": self.shortened / self.updates}
