"""The rank-one part of a loss's curvature: its coefficient in each sample, and the numbers that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
_TINY = torch.finfo(torch.float32).tiny

#: How many units of rounding a difference of two equal sums over classes may be off by.
_ROUNDING = 32

#: Taken from a row's total before something is divided by it, for the rows in which both are zero.
_HARMLESS = torch.tensor(1e-20)


class RankOne:
    """``c_b g_b g_b^T`` in every sample ``b``; the gradient is autograd's own wherever the part is met.

    Attributes:
        samples: How many samples there are.
        c: Their coefficients, a column; there as soon as the step that splits the curvature has run.
    """

    __slots__ = ("c", "samples")
    c: Tensor

    def __init__(self, samples: int, c: Tensor | None = None) -> None:
        self.samples = samples
        if c is not None:
            self.c = c

    def like(self, x: Tensor, inner: int) -> Tensor:
        """The coefficients, broadcastable to ``x``, in which ``inner`` neighbours belong together."""
        c = self.c
        if inner * self.samples == x.numel() and x.dim() and x.shape[0] == self.samples:
            return c if x.dim() == 2 else c.view(-1, *[1] * (x.dim() - 1))
        if self.samples == 1:
            return c.view(())
        return c.expand(self.samples, inner).expand(x.numel() // (self.samples * inner), -1, -1).reshape(x.shape)

    def diagonal(self, g: Tensor, inner: int) -> Tensor:
        """``c g^2``, in this order, because ``g^2`` may underflow where c is large."""
        return (g * self.like(g, inner)).mul_(g)

    def whole(self, g: Tensor | None, d: Tensor | None, inner: int) -> Tensor | None:
        """``d + c g^2``: the diagonal that a remainder ``d`` belongs to."""
        if g is None:
            return d
        if d is None:
            return self.diagonal(g, inner)
        whole = g * self.like(g, inner)
        return torch.addcmul(d, whole, g, out=whole)


class SoftmaxHead:
    """``H = w (diag p - p p^T)`` in every row, as log-softmax makes it, for a gradient ``g = w (p - t)``.

    Attributes:
        p: The probabilities.
        total: ``-w``, a column.
        others: ``w p`` apart from the picked class, where the loss is a function of one log-probability in each row;
            None: it is not.
        chosen: ``-w p_y``, a column, of the picked class; None: as for ``others``.
        passed: The diagonal that comes from above beside H; None: none.
    """

    __slots__ = ("chosen", "others", "p", "passed", "total")
    chosen: Tensor | None
    p: Tensor
    total: Tensor
    others: Tensor | None
    passed: Tensor | None

    def split(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """``c``, a column, and the number that :meth:`through` needs beside it.

        With t = 1 at the picked class y alone ``c = p_y / ((1 - p_y) w) = p_y / s``, where ``s = w (1 - p_y)`` is the
        sum over the others: no difference of nearly equal numbers, wherever p_y lies. Otherwise ``c = 1 / sum(g^2 / (w
        p))``, kept from outgrowing what the rounding of g allows.

        Args:
            g: The gradient at the softmax's input, a row for each of its rows.
        """
        eps = _EPS[g.dtype]
        if self.total.dim() != 2:
            self._flatten()
        total, p = self.total, self.p
        if self.others is not None and self.chosen is not None:
            total = total - _HARMLESS
            scale = self.others.sum(1, True).sub_(total, alpha=eps).reciprocal_()
            return self.chosen / total * scale, scale
        fit = (g * g).div_(p.clamp(min=_TINY)).sum(1, True)
        scale = torch.maximum(fit, (total * total).mul_(eps)).clamp_(min=_TINY).reciprocal_()
        return -scale * total, scale

    def through(self, weight: Tensor, g: Tensor, scale: Tensor) -> Tensor:
        """``diag(W (H - c g g^T) W^T)``, and what comes from above.

        For a picked class that is ``e (W^2)^T - (e W^T)^2 / s`` with e the others' ``w p``, else
        ``w (p (W^2)^T - (p W^T)^2) - c (g W^T)^2``.

        Args:
            weight: ``W^T``, classes by inputs.
            g: The gradient at the softmax's input.
            scale: From :meth:`split`.
        """
        square = weight * weight
        if self.others is not None:
            first = self.others.mm(square)
            rest = torch.addcmul(first, self.others.mm(weight).square_(), scale, value=-1)
            # It has the sign of the first term and vanishes for two classes: what rounding leaves there is none.
            rest = rest.where(rest / first > _ROUNDING * _EPS[first.dtype], 0.0)
        else:
            rest = self.p.mm(square).sub_(self.p.mm(weight).square_())
            rest.addcmul_(g.mm(weight).square_(), scale, value=-1).clamp_(min=0).mul_(-self.total)
        return rest if self.passed is None else rest.add_(self.passed.mm(square))

    def _flatten(self) -> None:
        """To a matrix with a row for each row of the softmax."""
        shape = (-1, self.p.shape[-1])
        self.total, self.p = self.total.reshape(-1, 1), self.p.reshape(shape)
        self.others = None if self.others is None else self.others.reshape(shape)
        self.chosen = None if self.chosen is None else self.chosen.reshape(-1, 1)
        self.passed = None if self.passed is None else self.passed.reshape(shape)


def of_diagonal(g: Tensor, h: Tensor, samples: int) -> Tensor:
    """``c = 1 / sum(g^2 / h)`` for ``H = diag h``, a column with an entry for each sample.

    Zero where g lies outside the range of H (h = 0 and g is not), where g is zero, and where the signs of h differ
    within a sample.
    """
    shares = (g * (g / h)).reshape(samples, -1)
    shares = shares.nan_to_num_(0.0, torch.inf, -torch.inf) if shares.shape[1] > 1 else shares
    total = shares.sum(1, keepdim=True)
    if shares.shape[1] > 1:
        total = total.where(total.abs() >= 0.999 * shares.abs().sum(1, keepdim=True), torch.inf)
    return total.reciprocal().where(total.abs() >= _TINY, 0.0)  # False for nan as well


def without(h: Tensor, part: Tensor) -> Tensor:
    """``h - part``, where ``part`` has the sign of h and is no larger but for rounding."""
    rest = h - part
    return torch.where((rest > 0) == (h > 0), rest, 0.0)
