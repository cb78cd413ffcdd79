r"""Statistics of a diagonal: pure functions, and thin torchmetrics classes over them.

Write :math:`h` for all entries of the given diagonals together, :math:`N` of them:

=================  =============================  ====================================================
trace              :math:`\sum_i h_i`             total curvature; the loss's Laplacian in the weights
mean_abs           :math:`\frac1N \sum_i |h_i|`   the scale of the curvature
max_abs            :math:`\max_i |h_i|`           the direction that limits the step size
negative_fraction  :math:`\frac1N |\{h_i < 0\}|`  how much of the loss bends downwards
=================  =============================  ====================================================

Nothing here waits for the device: every result is a tensor, and counts are taken from shapes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.metrics.base import CurvatureMetric, count, gather, total, wide


def trace(diagonals: Iterable[Tensor]) -> Tensor:
    """Sum of all entries.

    Args:
        diagonals: tensors of any shapes, for example ``p.hess_diag`` of every parameter; at least one.

    Returns:
        A scalar tensor on the first diagonal's device, float32 (float64 for float64 diagonals).

    Raises:
        ValueError: if there is no diagonal.

    Example:
        >>> trace([torch.tensor([1.0, -3.0]), torch.tensor([[4.0]])])
        tensor(2.)
    """
    return total([h.sum() for h in wide(diagonals)])


def mean_abs(diagonals: Iterable[Tensor]) -> Tensor:
    """Mean absolute entry; arguments and errors as in :func:`trace`.

    Example:
        >>> mean_abs([torch.tensor([1.0, -3.0]), torch.tensor([[5.0]])])
        tensor(3.)
    """
    hs = wide(diagonals)
    return total([h.abs().sum() for h in hs]) / count(hs)


def max_abs(diagonals: Iterable[Tensor]) -> Tensor:
    """Largest absolute entry; arguments and errors as in :func:`trace`.

    Example:
        >>> max_abs([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])])
        tensor(3.)
    """
    return gather([h.abs().amax() for h in wide(diagonals)]).amax()


def negative_fraction(diagonals: Iterable[Tensor]) -> Tensor:
    """Share of entries below zero; arguments and errors as in :func:`trace`.

    Example:
        >>> negative_fraction([torch.tensor([1.0, -3.0]), torch.tensor([[4.0, 0.0]])])
        tensor(0.2500)
    """
    hs = wide(diagonals)
    return total([(h < 0).sum(dtype=h.dtype) for h in hs]) / count(hs)


STATISTICS = {
    "trace": trace,
    "mean_abs": mean_abs,
    "max_abs": max_abs,
    "negative_fraction": negative_fraction,
}
"""The statistics that :class:`hesscale_lightning.HesScaleCallback` logs, by the last part of their key."""


class CurvatureTrace(CurvatureMetric):
    """Mean over updates of :func:`trace`.

    Example:
        >>> metric = CurvatureTrace()
        >>> metric.update([torch.tensor([1.0, 2.0])])
        >>> metric.update([torch.tensor([3.0, 4.0])])
        >>> metric.compute()
        tensor(5.)
    """

    total: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("updates", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, diagonals: Iterable[Tensor]) -> None:
        """Add one set of diagonals."""
        self.total += trace(diagonals)
        self.updates += 1

    def compute(self) -> Tensor:
        """The trace, averaged over the updates."""
        return self.total / self.updates


class CurvatureMeanAbs(CurvatureMetric):
    """Mean absolute entry over all entries of all updates, see :func:`mean_abs`.

    Example:
        >>> metric = CurvatureMeanAbs()
        >>> metric.update([torch.tensor([1.0, -3.0]), torch.tensor([[5.0]])])
        >>> metric.compute()
        tensor(3.)
    """

    total: Tensor
    entries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("entries", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, diagonals: Iterable[Tensor]) -> None:
        """Add one set of diagonals."""
        diagonals = list(diagonals)
        value = mean_abs(diagonals)
        entries = count(diagonals)
        self.total += value * entries
        self.entries += entries

    def compute(self) -> Tensor:
        """The mean absolute entry."""
        return self.total / self.entries


class CurvatureMaxAbs(CurvatureMetric):
    """Largest absolute entry of all updates, see :func:`max_abs`.

    Example:
        >>> metric = CurvatureMaxAbs()
        >>> metric.update([torch.tensor([1.0, -3.0])])
        >>> metric.update([torch.tensor([2.0])])
        >>> metric.compute()
        tensor(3.)
    """

    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("largest", default=torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, diagonals: Iterable[Tensor]) -> None:
        """Add one set of diagonals."""
        self.largest = torch.maximum(self.largest, max_abs(diagonals))

    def compute(self) -> Tensor:
        """The largest absolute entry."""
        return self.largest


class CurvatureNegativeFraction(CurvatureMetric):
    """Share of negative entries over all entries of all updates, see :func:`negative_fraction`.

    Example:
        >>> metric = CurvatureNegativeFraction()
        >>> metric.update([torch.tensor([1.0, -3.0]), torch.tensor([[4.0, 0.0]])])
        >>> metric.compute()
        tensor(0.2500)
    """

    negative: Tensor
    entries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("negative", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("entries", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, diagonals: Iterable[Tensor]) -> None:
        """Add one set of diagonals."""
        diagonals = list(diagonals)
        value = negative_fraction(diagonals)
        entries = count(diagonals)
        self.negative += value * entries
        self.entries += entries

    def compute(self) -> Tensor:
        """The share of negative entries."""
        return self.negative / self.entries
