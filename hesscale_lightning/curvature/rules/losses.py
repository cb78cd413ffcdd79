"""Losses that are one node; the others of torch.nn.functional are made of operations that have rules of their own.

Each is ``reduce(w l(x, t))`` with ``l`` taken entry by entry, so ``h_x = (c l')^2 h + c l'' g`` with ``c = w`` under
``reduction="none"`` and ``"sum"``, and ``c = w / n`` under ``"mean"``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import elementwise
from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, Partials, PartialsRule, register_rule
from hesscale_lightning.curvature.rules.reduction import curve

_MEAN = 1  # at::Reduction
_nll_backward = torch.ops.aten.nll_loss_backward.default
_multi_margin_backward = torch.ops.aten.multi_margin_loss_backward.default
_multilabel_margin_backward = torch.ops.aten.multilabel_margin_loss_backward.default
_ctc_backward = torch.ops.aten._ctc_loss_backward
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


# -- binary cross-entropy: curved in the target as well, and entrywise in both, so that paths may meet in it -----------


def _either(op: Operation, partials: PartialsRule, by_input: Formula) -> Formula:
    """``by_input`` if only the input is wanted, else the rule by ``partials``."""
    if not op.needs[1]:
        return by_input
    derivatives, needs = partials(op), op.needs

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        first, second = derivatives(g is not None)
        return [curve(first[i], second.get((i, i)), g, h) if need else None for i, need in enumerate(needs)]

    return formula


def _factor(op: Operation) -> Tensor | float:
    """``w``, divided by the number of entries under ``reduction="mean"``."""
    count, weight = op.node._saved_self.numel(), op.node._saved_weight
    scale = 1 / count if op.node._saved_reduction == _MEAN and count else 1.0
    return scale if weight is None else full(weight) * scale


def _bce(op: Operation) -> Formula:
    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        variance = (x * (1 - x)).clamp(min=1e-12)
        first = (x - t) / variance
        # t / x^2 + (1 - t) / (1 - x)^2 over the common denominator
        return first, (t * (1 - x).square() + (1 - t) * x.square()) / variance.square()

    return _either(op, bce, _entrywise(op, slopes, weight=op.node._saved_weight))


@elementwise("BinaryCrossEntropyBackward0", formula=_bce, reduces=True)
def bce(op: Operation) -> Callable[[bool], Partials]:
    """``l_x = (x - t) / v``, ``l_xx = t / x^2 + (1 - t) / (1 - x)^2`` with ``v = x (1 - x)``; ``l_t = -logit x``.

    Like torch's gradient, ``v`` is kept above 1e-12.
    """
    saved, target, factor = op.node._saved_self, op.node._saved_target, _factor(op)

    def partials(_: bool) -> Partials:
        x, t = full(saved), full(target)
        variance = (x * (1 - x)).clamp(min=1e-12)
        by_x, by_t = (x - t) / variance, (1 - x).log().clamp(min=-100) - x.log().clamp(min=-100)
        bend = (t * (1 - x).square() + (1 - t) * x.square()) / variance.square()
        return (by_x * factor, by_t * factor), {(0, 0): bend * factor, (0, 1): -factor / variance}

    return partials


def _bce_with_logits(op: Operation) -> Formula:
    pos_weight = op.node._saved_pos_weight

    def slopes(x: Tensor, t: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(x)
        bend = torch.addcmul(s, s, s, value=-1)
        if pos_weight is None:
            return s - t, bend
        positive = full(pos_weight) * t
        c = positive + 1 - t
        return c * s - positive, c * bend

    return _either(op, bce_with_logits, _entrywise(op, slopes, weight=op.node._saved_weight))


@elementwise("BinaryCrossEntropyWithLogitsBackward0", formula=_bce_with_logits, reduces=True)
def bce_with_logits(op: Operation) -> Callable[[bool], Partials]:
    """With ``s = sigmoid(x)``, ``k = pos_weight``, ``c = 1 + (k - 1) t``: ``l_x = c s - k t``, ``l_xx = c s (1 - s)``.

    In the target ``l_t = (k - 1) softplus(-x) - x``, and ``l_xt = (k - 1) s - k``.
    """
    saved, target, factor, pos_weight = (
        op.node._saved_self,
        op.node._saved_target,
        _factor(op),
        op.node._saved_pos_weight,
    )

    def partials(_: bool) -> Partials:
        x, t = full(saved), full(target)
        s = torch.sigmoid(x)
        k = 1.0 if pos_weight is None else full(pos_weight)
        c = 1 + (k - 1) * t
        by_t = (k - 1) * torch.nn.functional.softplus(-x) - x
        second = {(0, 0): c * s * (1 - s) * factor, (0, 1): ((k - 1) * s - k) * factor}
        return ((c * s - k * t) * factor, by_t * factor), second

    return partials


# -- losses over classes and sequences ---------------------------------------------------------------------------------


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


@register_rule("MultiMarginLossBackward0", curved=True)
def multi_margin(op: Operation) -> Formula:
    """``l = w sum_k max(0, margin - x_y + x_k)^p / C``: with p = 2 each active k adds ``2 w / C`` at k and at y."""
    node = op.node
    saved, target, p, margin = node._saved_self, node._saved_target, node._saved_p, node._saved_margin
    weight, reduction = node._saved_weight, node._saved_reduction
    op.curved = p == 2

    def derivative(order: int) -> Tensor:
        x = full(saved)
        ones = x.new_ones(x.shape[:-1] if reduction == 0 else ())
        slope: Tensor = _multi_margin_backward(ones, x, target, order, margin, weight, reduction)
        return slope

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        g, h = (t if t is None or t.dim() == 0 else t.unsqueeze(-1) for t in (g, h))
        total = None if h is None else derivative(p).square() * h
        if g is not None:
            made = 2 * derivative(1).abs() * g  # active ones at k, their number at y, all times w / C
            total = made if total is None else total + made
        return (total,)

    return formula if op.curved else lambda h: formula(None, h)


@register_rule("MultilabelMarginLossBackward0")
def multilabel_margin(op: Operation) -> Formula:
    """Piecewise linear, and every entry acts on one output: the gradient of a unit, squared."""
    node = op.node
    saved, target, is_target, reduction = (
        node._saved_self, node._saved_target, node._saved_is_target, node._saved_reduction
    )  # fmt: skip

    def formula(h: Tensor) -> Diagonals:
        x = full(saved)
        slope = _multilabel_margin_backward(torch.ones_like(h), x, target, reduction, is_target.to(x.dtype))
        return (slope.square() * (h.unsqueeze(-1) if h.dim() else h),)

    return formula


@register_rule("CtcLossBackward0", "CtcLossBackward1", curved=True)
def ctc(op: Operation) -> Formula:
    """With ``p = exp(x)`` and a label's posterior ``q`` at each time: ``(p - q)^2 h + [p (1 - p) - q (1 - q)] g``.

    Torch takes the log-probabilities for normalised and has ``p - q`` for the gradient, that of the loss of the logits.
    This is the second derivative that belongs to it: the logits' curvature is made here, and log_softmax adds none.
    """
    node = op.node
    x, targets, lengths, target_lengths = (
        node._saved_log_probs, node._saved_targets, node._saved_input_lengths, node._saved_target_lengths
    )  # fmt: skip
    rest = node._saved_result0, node._saved_result1, node._saved_blank, node._saved_zero_infinity

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        slope = _ctc_backward(torch.ones_like(rest[0]), x, targets, lengths, target_lengths, *rest)
        total = None if h is None else slope.square() * h[..., None]
        if g is not None:
            p = x.exp()
            # with q = p - slope; slope is zero after a sequence's end, where q = p
            made = slope * (1 - 2 * p + slope) * g[..., None]
            total = made if total is None else total + made
        return (total,)

    return formula
