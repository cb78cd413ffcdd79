"""The rank-one part of a loss's curvature: its coefficient in each sample, and the numbers that follow from it."""

from __future__ import annotations

import torch

from hesscale_lightning.curvature.values import ZERO, Value

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
_TINY = torch.finfo(torch.float32).tiny
_threshold_backward = torch.ops.aten.threshold_backward.default  # its first argument where the second exceeds a number

#: How many units of rounding a difference of two equal sums over classes may be off by.
_ROUNDING = 32

#: Taken from a row's total before something is divided by it, for the rows in which both are zero.
_HARMLESS = 1e-20


class RankOne:
    """``c_b g_b g_b^T`` in every sample ``b``; the gradient is autograd's own wherever the part is met.

    Attributes:
        samples: How many samples there are.
        c: Their coefficients, a column; there as soon as the step that splits the curvature has run.
    """

    __slots__ = ("c", "samples")
    c: Value

    def __init__(self, samples: int, c: Value | None = None) -> None:
        self.samples = samples
        if c is not None:
            self.c = c

    def like(self, x: Value, inner: int) -> Value:
        """The coefficients, broadcastable to ``x``, in which ``inner`` neighbours belong together."""
        c = self.c
        if inner * self.samples == x.numel() and x.dim() and x.shape[0] == self.samples:
            return c if x.dim() == 2 else c.view(-1, *[1] * (x.dim() - 1))
        if self.samples == 1:
            return c.view(())
        return c.expand(self.samples, inner).expand(x.numel() // (self.samples * inner), -1, -1).reshape(x.shape)

    def diagonal(self, g: Value, inner: int) -> Value:
        """``c g^2``, in this order, because ``g^2`` may underflow where c is large."""
        return g * self.like(g, inner) * g

    def whole(self, g: Value, d: Value, inner: int) -> Value:
        """``d + c g^2``: the diagonal that a remainder ``d`` belongs to."""
        return d if g is ZERO else d + self.diagonal(g, inner)


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
    chosen: Value | None
    p: Value
    total: Value
    others: Value | None
    passed: Value | None

    def split(self, g: Value) -> tuple[Value, Value]:
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
            scale = 1 / (self.others.sum(1, keepdim=True) - total * eps)
            return self.chosen / total * scale, scale
        fit = (g * g / p.clamp(min=_TINY)).sum(1, keepdim=True)
        scale = 1 / torch.maximum(fit, total * total * eps).clamp(min=_TINY)
        return -scale * total, scale

    def through(self, weight: Value, g: Value, scale: Value) -> Value:
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
            first = self.others @ square
            along = self.others @ weight
            rest = first - along * along * scale
            # It has the sign of the first term and vanishes for two classes: what rounding leaves there is none.
            rest = _threshold_backward(rest, rest / first, _ROUNDING * _EPS[first.dtype])
        else:
            mean, along = self.p @ weight, g @ weight
            rest = self.p @ square - mean * mean
            rest = (rest - along * along * scale).clamp(min=0) * -self.total
        return rest if self.passed is None else rest + self.passed @ square

    def _flatten(self) -> None:
        """To a matrix with a row for each row of the softmax."""
        shape = (-1, self.p.shape[-1])
        self.total, self.p = self.total.reshape(-1, 1), self.p.reshape(shape)
        self.others = None if self.others is None else self.others.reshape(shape)
        self.chosen = None if self.chosen is None else self.chosen.reshape(-1, 1)
        self.passed = None if self.passed is None else self.passed.reshape(shape)


def of_diagonal(g: Value, h: Value, samples: int) -> Value:
    """``c = 1 / sum(g^2 / h)`` for ``H = diag h``, a column with an entry for each sample.

    Zero where g lies outside the range of H (h = 0 and g is not), where g is zero, and where the signs of h differ
    within a sample.
    """
    shares = (g * (g / h)).reshape(samples, -1)
    if shares.shape[1] > 1:
        shares = shares.nan_to_num(0.0, torch.inf, -torch.inf)
        total = shares.sum(1, keepdim=True)
        total = total.where(total.abs() >= 0.999 * shares.abs().sum(1, keepdim=True), torch.inf)
    else:
        total = shares.sum(1, keepdim=True)
    return total.reciprocal().where(total.abs() >= _TINY, 0.0)  # False for nan as well


def without(h: Value, part: Value) -> Value:
    """``h - part``, where ``part`` has the sign of h and is no larger but for rounding."""
    rest = h - part
    return rest.where((rest > 0) == (h > 0), 0.0)
