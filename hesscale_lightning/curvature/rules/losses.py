"""Losses that are one node; the others of torch.nn.functional are made of operations that have rules of their own.

Each is ``reduce(w l(x, t))`` with ``l`` taken entry by entry, so ``h_x = (c l')^2 h + c l'' g`` with ``c = w`` under
``reduction="none"`` and ``"sum"``, and ``c = w / n`` under ``"mean"``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_MEAN = 1  # at::Reduction
_nll_backward = torch.ops.aten.nll_loss_backward.default
_nll2d_backward = torch.ops.aten.nll_loss2d_backward.default

Slopes = Callable[[Tensor, Tensor, bool], tuple[Tensor | float, Tensor | float]]


def _entrywise(op: Operation, slopes: Slopes, symmetric: bool = False, weight: Tensor | None = None) -> Formula:
    """The rule of ``reduce(w l(x, t))``.

    Args:
        op: The operation; its node saved ``self`` and ``target``.
        slopes: From ``x``, ``t`` and whether the first is wanted: ``l'`` and ``l''`` by ``x``.
        symmetric: ``l`` depends on ``x - t`` only, so that the target's diagonal is the input's.
        weight: ``w``, broadcast to ``x``; None is 1.
    """
    x, t = op.node._saved_self, op.node._saved_target
    scale = 1 / x.numel() if op.node._saved_reduction == _MEAN and x.numel() else 1.0
    if not symmetric and len(op.needs) > 1 and op.needs[1]:
        raise op.unsupported("curvature with respect to the target of this loss is not supported; detach() the target")
    shape = x.shape

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        first, second = slopes(full(x), full(t), h is not None)
        total: Tensor | float = 0.0
        if h is not None:
            slope = first * scale if weight is None else first * full(weight) * scale
            total = slope * slope * h
        if g is not None:
            factor = g * scale if weight is None else g * full(weight) * scale
            total = total + factor * second
        assert isinstance(total, Tensor)  # one of them is there
        total = total.expand(shape)
        return (total, total) if symmetric else (total, *[None] * (len(op.needs) - 1))

    return formula


@register_rule("MseLossBackward0", curved=True)
def mse(op: Operation) -> Formula:
    """``l' = 2 (x - t)``, ``l'' = 2``."""
    return _entrywise(op, lambda x, t, first: ((x - t) * 2 if first else 0.0, 2.0), symmetric=True)


@register_rule("HuberLossBackward0", curved=True)
def huber(op: Operation) -> Formula:
    """``l' = clamp(x - t, -delta, delta)``; ``l'' = 1`` inside, 0 outside."""
    delta = op.node._saved_delta

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        d = x - t
        return d.clamp(-delta, delta), (d.abs() <= delta).to(d.dtype)

    return _entrywise(op, slopes, symmetric=True)


@register_rule("SmoothL1LossBackward0", curved=True)
def smooth_l1(op: Operation) -> Formula:
    """``l' = clamp((x - t) / beta, -1, 1)``; ``l'' = 1 / beta`` inside, 0 outside."""
    beta = op.node._saved_beta

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        d = x - t
        return (d / beta).clamp(-1, 1), (d.abs() < beta).to(d.dtype) / beta

    return _entrywise(op, slopes, symmetric=True)


@register_rule("SoftMarginLossBackward0", curved=True)
def soft_margin(op: Operation) -> Formula:
    """``l = log(1 + exp(-t x))``, with ``s = sigmoid(-t x)``: ``l' = -t s``, ``l'' = t^2 s (1 - s)``."""

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(-t * x)
        return -t * s, t * t * s * (1 - s)

    return _entrywise(op, slopes)


@register_rule("BinaryCrossEntropyBackward0", curved=True)
def bce(op: Operation) -> Formula:
    """``l' = (x - t) / (x (1 - x))``, ``l'' = t / x^2 + (1 - t) / (1 - x)^2``.

    Like torch's gradient, ``x (1 - x)`` is kept above 1e-12.
    """

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        variance = (x * (1 - x)).clamp(min=1e-12)
        first = (x - t) / variance
        # t / x^2 + (1 - t) / (1 - x)^2 over the common denominator
        return first, (t * (1 - x).square() + (1 - t) * x.square()) / variance.square()

    return _entrywise(op, slopes, weight=op.node._saved_weight)


@register_rule("BinaryCrossEntropyWithLogitsBackward0", curved=True)
def bce_with_logits(op: Operation) -> Formula:
    """With ``s = sigmoid(x)``, ``c = 1 + (pos_weight - 1) t``: ``l' = c s - pos_weight t``, ``l'' = c s (1 - s)``."""
    pos_weight = op.node._saved_pos_weight

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        bend = torch.addcmul(s, s, s, value=-1)
        if pos_weight is None:
            return s - t, bend
        positive = full(pos_weight) * t
        c = positive + 1 - t
        return c * s - positive, c * bend

    return _entrywise(op, slopes, weight=op.node._saved_weight)


@register_rule("NllLossBackward0", "NllLoss2DBackward0")
def nll(op: Operation) -> Formula:
    """Linear: the target's entry gets ``(w / W)^2 h``, with ``W`` the mean's divisor (else 1)."""
    node = op.node
    x, target, weight, divisor = node._saved_self, node._saved_target, node._saved_weight, node._saved_total_weight
    reduction, ignored = node._saved_reduction, node._saved_ignore_index
    ignored = ignored - 2**64 if ignored >= 2**63 else ignored
    backward = _nll_backward if node.name() == "NllLossBackward0" else _nll2d_backward

    def formula(h: Tensor) -> Diagonals:
        square = None if weight is None else full(weight).square()
        return (backward(h, full(x), target, square, reduction, ignored, full(divisor).square()).neg_(),)

    return formula
