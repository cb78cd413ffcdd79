r"""How far a diagonal is from the true one.

With the estimate :math:`h` and the reference :math:`e`, over all their entries: the relative L1 error
:math:`\sum |h_i - e_i| / \sum |e_i|`, and the cosine similarity
:math:`\sum h_i e_i / \sqrt{\sum h_i^2 \sum e_i^2}`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.metrics.base import CurvatureMetric, gather, paired


def relative_l1_error(diagonals: Iterable[Tensor], reference: Iterable[Tensor]) -> Tensor:
    """Sum of absolute errors over the sum of absolute true entries.

    Args:
        diagonals: the estimate, tensors of any shapes.
        reference: the true diagonal, of the same shapes.

    Returns:
        A scalar tensor; 0 is perfect, 1 no better than an estimate of zeros.

    Raises:
        ValueError: if there is no diagonal, or the shapes differ.

    Example:
        >>> relative_l1_error([torch.tensor([1.0, 3.0])], [torch.tensor([2.0, 2.0])])
        tensor(0.5000)
    """
    return compared(comparison_sums(diagonals, reference))["relative_l1"]


def cosine_similarity(diagonals: Iterable[Tensor], reference: Iterable[Tensor]) -> Tensor:
    """Cosine of the angle between a diagonal and the true one; arguments and errors as :func:`relative_l1_error`.

    Example:
        >>> cosine_similarity([torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])])
        tensor(0.9600)
    """
    return compared(comparison_sums(diagonals, reference))["cosine"]


def comparison_sums(diagonals: Iterable[Tensor], reference: Iterable[Tensor]) -> Tensor:
    """The five sums that both figures are made of, which add up over batches and processes.

    Returns:
        ``sum |h - e|``, ``sum |e|``, ``sum h e``, ``sum h^2``, ``sum e^2``, in a tensor of shape (5,).
    """
    pairs = paired(diagonals, reference, ("diagonals", "reference diagonals"))
    parts = [
        torch.stack([(h - e).abs().sum(), e.abs().sum(), (h * e).sum(), h.square().sum(), e.square().sum()])
        for h, e in pairs
    ]
    return sum((part.to(parts[0]) for part in parts[1:]), parts[0])


def compared(sums: Tensor) -> dict[str, Tensor]:
    """Both figures from :func:`comparison_sums`."""
    error, size, dot, first, second = sums.unbind()
    return {"relative_l1": error / size, "cosine": dot / gather([first, second]).sqrt().prod()}


class CurvatureAuditError(CurvatureMetric):
    """Relative L1 error and cosine similarity over all entries of all updates.

    Example:
        >>> metric = CurvatureAuditError()
        >>> metric.update([torch.tensor([1.0, 3.0])], [torch.tensor([2.0, 2.0])])
        >>> metric.compute()
        {'relative_l1': tensor(0.5000), 'cosine': tensor(0.8944)}
    """

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", default=torch.zeros(5), dist_reduce_fx="sum")

    def update(self, diagonals: Iterable[Tensor], reference: Iterable[Tensor]) -> None:
        """Add one estimate and the true diagonal."""
        self.sums += comparison_sums(diagonals, reference).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Both figures."""
        return compared(self.sums)
