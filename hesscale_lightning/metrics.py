r"""Summaries of a diagonal: pure functions, and thin torchmetrics classes over them.

Write :math:`h` for all entries of the given diagonals together, :math:`N` of them:

=================  =============================  ====================================================
trace              :math:`\sum_i h_i`             total curvature; the loss's Laplacian in the weights
mean_abs           :math:`\frac1N \sum_i |h_i|`   the scale of the curvature
max_abs            :math:`\max_i |h_i|`           the direction that limits the step size
negative_fraction  :math:`\frac1N |\{h_i < 0\}|`  how much of the loss bends downwards
=================  =============================  ====================================================

Nothing here waits for the device: every result is a tensor, and counts are taken from shapes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


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
    return _total([h.sum() for h in _wide(diagonals)])


def mean_abs(diagonals: Iterable[Tensor]) -> Tensor:
    """Mean absolute entry; arguments and errors as in :func:`trace`.

    Example:
        >>> mean_abs([torch.tensor([1.0, -3.0]), torch.tensor([[5.0]])])
        tensor(3.)
    """
    hs = _wide(diagonals)
    return _total([h.abs().sum() for h in hs]) / _count(hs)


def max_abs(diagonals: Iterable[Tensor]) -> Tensor:
    """Largest absolute entry; arguments and errors as in :func:`trace`.

    Example:
        >>> max_abs([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])])
        tensor(3.)
    """
    return _gather([h.abs().amax() for h in _wide(diagonals)]).amax()


def negative_fraction(diagonals: Iterable[Tensor]) -> Tensor:
    """Share of entries below zero; arguments and errors as in :func:`trace`.

    Example:
        >>> negative_fraction([torch.tensor([1.0, -3.0]), torch.tensor([[4.0, 0.0]])])
        tensor(0.2500)
    """
    hs = _wide(diagonals)
    return _total([(h < 0).sum(dtype=h.dtype) for h in hs]) / _count(hs)


STATISTICS = {
    "trace": trace,
    "mean_abs": mean_abs,
    "max_abs": max_abs,
    "negative_fraction": negative_fraction,
}
"""The statistics that :class:`hesscale_lightning.HesScaleCallback` logs, by the last part of their key."""


class _CurvatureMetric(Metric):
    """What the classes below share: not differentiable, no better direction, state that adds up."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one value, or several over time.

        Args:
            val: one result of ``compute`` or ``forward``, or a list of them; None draws ``compute()``.
            ax: a matplotlib axis to draw into; None makes a new figure.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


class CurvatureTrace(_CurvatureMetric):
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


class CurvatureMeanAbs(_CurvatureMetric):
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
        count = _count(diagonals)
        self.total += mean_abs(diagonals) * count
        self.entries += count

    def compute(self) -> Tensor:
        """The mean absolute entry."""
        return self.total / self.entries


class CurvatureMaxAbs(_CurvatureMetric):
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


class CurvatureNegativeFraction(_CurvatureMetric):
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
        count = _count(diagonals)
        self.negative += negative_fraction(diagonals) * count
        self.entries += count

    def compute(self) -> Tensor:
        """The share of negative entries."""
        return self.negative / self.entries


def _wide(diagonals: Iterable[Tensor]) -> list[Tensor]:
    """The diagonals with entries, in at least float32: a sum of half-precision squares overflows."""
    hs = [h.detach() if h.dtype in (torch.float32, torch.float64) else h.detach().float() for h in diagonals]
    hs = [h for h in hs if h.numel()]
    if not hs:
        raise ValueError(
            "Found no diagonal to summarise, expected at least one tensor with entries. p.hess_diag is set by the "
            "backward pass that follows hesscale_lightning.attach(loss)."
        )
    return hs


def _count(diagonals: Iterable[Tensor]) -> int:
    return sum(h.numel() for h in diagonals)


def _gather(scalars: Sequence[Tensor]) -> Tensor:
    first = scalars[0]
    return torch.stack([s.to(device=first.device, dtype=first.dtype) for s in scalars])


def _total(scalars: Sequence[Tensor]) -> Tensor:
    return _gather(scalars).sum()
