r"""Where the curvature is: its share by layer, and its histogram.

With :math:`h` the entries of one layer and :math:`H` those of all layers, the layer's share is
:math:`\sum |h_i| / \sum |H_i|`. The histogram counts :math:`\log_{10} |h_i|`, because the entries of one network span
many orders of magnitude.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.metrics.base import CurvatureMetric, gather, total, wide

LOWEST, HIGHEST, BINS = -12.0, 6.0, 72
"""The histogram's default range, in powers of ten, and its number of bins: four for each power."""


def layer_shares(layers: Mapping[str, Iterable[Tensor]]) -> dict[str, Tensor]:
    """Share of each layer in the sum of all absolute entries.

    Args:
        layers: each layer's diagonals, by the layer's name.

    Returns:
        A scalar tensor for each layer. They sum to 1, or are all 0 where all curvature is 0.

    Raises:
        ValueError: if there is no layer, or one without a diagonal.

    Example:
        >>> layer_shares({"first": [torch.tensor([1.0, -2.0])], "last": [torch.tensor([5.0])]})
        {'first': tensor(0.3750), 'last': tensor(0.6250)}
    """
    sums = _absolute_sums(layers)
    return dict(zip(layers, _shares(sums), strict=True))


def log_histogram(
    diagonals: Iterable[Tensor], lowest: float = LOWEST, highest: float = HIGHEST, bins: int = BINS
) -> Tensor:
    """Counts of ``log10 |h|`` in bins of equal width; smaller entries, zeros included, count in the first bin.

    Args:
        diagonals: tensors of any shapes, at least one.
        lowest: left edge of the first bin, a power of ten.
        highest: right edge of the last bin, which also counts what is larger.
        bins: number of bins.

    Returns:
        Counts of shape (bins,), float32, on the first diagonal's device.

    Raises:
        ValueError: if there is no diagonal, or the range is empty.

    Example:
        >>> log_histogram([torch.tensor([0.0, 0.5, -5.0, 5.0])], lowest=-2, highest=1, bins=3)
        tensor([1., 1., 2.])
    """
    if not lowest < highest or bins < 1:
        raise ValueError(
            f"Found lowest={lowest}, highest={highest} and bins={bins}, expected lowest < highest and at least one bin."
        )
    hs = wide(diagonals)
    counts = hs[0].new_zeros(bins, dtype=torch.float32)
    for h in hs:
        position = (h.reshape(-1).abs().log10() - lowest) * (bins / (highest - lowest))
        index = position.nan_to_num(nan=bins - 1.0, neginf=0.0, posinf=bins - 1.0).clamp(0, bins - 1).to(counts.device)
        counts.index_add_(0, index.long(), torch.ones_like(index, dtype=torch.float32))
    return counts


class CurvatureLayerShares(CurvatureMetric):
    """Share of each layer over all updates, see :func:`layer_shares`.

    Args:
        layers: the layers' names.
        kwargs: as for any torchmetrics metric.

    Example:
        >>> metric = CurvatureLayerShares(["first", "last"])
        >>> metric.update({"first": [torch.tensor([1.0, -2.0])], "last": [torch.tensor([5.0])]})
        >>> metric.compute()
        {'first': tensor(0.3750), 'last': tensor(0.6250)}
    """

    totals: Tensor

    def __init__(self, layers: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.add_state("totals", default=torch.zeros(len(self.layers)), dist_reduce_fx="sum")

    def update(self, layers: Mapping[str, Iterable[Tensor]]) -> None:
        """Add one set of diagonals, by layer; a layer that is missing adds nothing."""
        unknown = sorted(set(layers) - set(self.layers))
        if unknown:
            raise ValueError(f"Found the layers {unknown}, expected some of {self.layers}.")
        sums = dict(zip(layers, _absolute_sums(layers), strict=True))
        self.totals += gather([sums.get(name, self.totals.new_zeros(())) for name in self.layers]).to(self.totals)

    def compute(self) -> dict[str, Tensor]:
        """Each layer's share."""
        return dict(zip(self.layers, _shares(self.totals), strict=True))


class CurvatureHistogram(CurvatureMetric):
    """Histogram of ``log10 |h|`` over all updates, see :func:`log_histogram`.

    Args:
        lowest: left edge of the first bin, a power of ten.
        highest: right edge of the last bin.
        bins: number of bins.
        kwargs: as for any torchmetrics metric.

    Example:
        >>> metric = CurvatureHistogram(lowest=-2, highest=1, bins=3)
        >>> metric.update([torch.tensor([0.0, 0.5, -5.0, 5.0])])
        >>> metric.compute()
        tensor([1., 1., 2.])
    """

    counts: Tensor

    def __init__(self, lowest: float = LOWEST, highest: float = HIGHEST, bins: int = BINS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lowest, self.highest, self.bins = lowest, highest, bins
        self.add_state("counts", default=torch.zeros(bins), dist_reduce_fx="sum")

    @property
    def edges(self) -> Tensor:
        """The bins' edges in powers of ten, of shape (bins + 1,)."""
        return torch.linspace(self.lowest, self.highest, self.bins + 1)

    def update(self, diagonals: Iterable[Tensor]) -> None:
        """Add one set of diagonals."""
        self.counts += log_histogram(diagonals, self.lowest, self.highest, self.bins).to(self.counts)

    def compute(self) -> Tensor:
        """The counts, of shape (bins,)."""
        return self.counts

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the histogram.

        Args:
            val: counts to draw; None draws ``compute()``.
            ax: a matplotlib axis to draw into; None makes a new figure.

        Returns:
            The figure and the axis.
        """
        import matplotlib.pyplot as plt

        counts = self.compute() if val is None else val
        axis = plt.subplots()[1] if ax is None else ax
        axis.stairs(counts.cpu().numpy(), self.edges.numpy(), fill=True)
        axis.set(xlabel="log10 |h|", ylabel="entries")
        return axis.figure, axis


def _absolute_sums(layers: Mapping[str, Iterable[Tensor]]) -> Tensor:
    if not layers:
        raise ValueError("Found no layer, expected at least one name with its diagonals.")
    return gather([total([h.abs().sum() for h in wide(diagonals)]) for diagonals in layers.values()])


def _shares(sums: Tensor) -> Tensor:
    return sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
