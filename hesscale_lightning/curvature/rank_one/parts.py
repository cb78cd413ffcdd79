"""The rank-one part of a loss's curvature: its coefficient in each sample, and the numbers that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor


class RankOne:
    """``c_b g_b g_b^T`` in every sample ``b``; the gradient is autograd's own wherever the part is met.

    Attributes:
        samples: How many samples there are.
        c: Their coefficients, a column; there as soon as the step that splits the curvature has run.
    """

    __slots__ = ("c", "samples")
    c: Tensor

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def like(self, x: Tensor, inner: int) -> Tensor:
        """The coefficients, broadcastable to ``x``, in which ``inner`` neighbours belong together."""
        c = self.c
        if inner * self.samples == x.numel() and x.dim() and x.shape[0] == self.samples:
            return c if x.dim() == 2 else c.view(-1, *[1] * (x.dim() - 1))
        if self.samples == 1:
            return c.view(())
        return c.expand(self.samples, inner).expand(x.numel() // (self.samples * inner), -1, -1).reshape(x.shape)

    def diagonal(self, g: Tensor, inner: int) -> Tensor:
        """``c g^2``; ``g^2`` alone may underflow where c is large."""
        return (g * self.like(g, inner)).mul_(g)

    def whole(self, g: Tensor | None, d: Tensor | None, inner: int) -> Tensor | None:
        """``d + c g^2``: the diagonal that a remainder ``d`` belongs to."""
        if g is None:
            return d
        if d is None:
            return self.diagonal(g, inner)
        return torch.addcmul(d, g * self.like(g, inner), g)


class SoftmaxHead:
    """What the rule of log-softmax leaves for the steps below: ``H = w (diag p - p p^T)`` in every row.

    Attributes:
        p: The probabilities.
        w: Weight of each row, one entry along the dimension of the classes.
    """

    __slots__ = ("p", "w")
    p: Tensor
    w: Tensor


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
    tiny = torch.finfo(total.dtype).tiny
    return total.reciprocal().where(total.abs() >= tiny, 0.0)  # False for nan as well


def of_softmax(g: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """``1 / sum(g^2 / p)`` for every row: ``c / w`` for ``H = w (diag p - p p^T)`` and a gradient ``g = w (p - t)``.

    Where p is close to t this is a small number's inverse, and must not outgrow what the rounding of g allows.
    """
    limits = torch.finfo(p.dtype)
    total = (g * g).div_(p.clamp(min=limits.tiny)).sum(-1, keepdim=True)
    return torch.maximum(total, (w * w).mul_(limits.eps)).clamp_(min=limits.tiny).reciprocal_()


def without(h: Tensor, part: Tensor) -> Tensor:
    """``h - part``, where ``part`` has the sign of h and is no larger but for rounding."""
    rest = h - part
    return torch.where((rest > 0) == (h > 0), rest, 0.0)
