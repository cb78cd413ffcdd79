"""Losses that are one node; the others of torch.nn.functional are made of operations that have rules of their own.

Each is ``reduce(w l(x, t))`` with ``l`` taken entry by entry, so ``h_x = (c l')^2 h + c l'' g`` with ``c = w`` under
``reduction="none"`` and ``"sum"``, and ``c = w / n`` under ``"mean"``.
"""

from __future__ import annotations

from typing import Any

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value

_MEAN = 1  # at::Reduction
_aten = torch.ops.aten
_nll_backward = {
    "NllLossBackward0": _aten.nll_loss_backward.default,
    "NllLoss2DBackward0": _aten.nll_loss2d_backward.default,
}
_multi_margin_backward = _aten.multi_margin_loss_backward.default
_multilabel_margin_backward = _aten.multilabel_margin_loss_backward.default
_ctc_backward = _aten._ctc_loss_backward


def _scale(op: Operation) -> float:
    """``1 / n`` under ``reduction="mean"``."""
    count = op.input(0, "self").numel()
    return 1 / count if op.number("reduction") == _MEAN and count else 1.0


def _reduced(op: Operation, g: Value, h: Value, slope: Value, bend: Value) -> Value:
    """``(c l')^2 h + c l'' g`` for every entry, from ``l'`` and ``l''``."""
    c = _scale(op)
    passed = ZERO if h is ZERO else (slope * c) * (slope * c) * h
    return (passed + bend * (g * c)).expand(op.input(0, "self").shape)


# -- losses of a difference: what the target gets is what the input gets -----------------------------------------------


@register_rule("MseLossBackward0")
def mse(op: Operation, g: Value, h: Value) -> Any:
    """``l' = 2 (x - t)``, ``l'' = 2``."""
    slope = ZERO if h is ZERO else (op.input(0, "self") - op.input(1, "target")) * 2
    return (_reduced(op, g, h, slope, 2.0),) * 2


@register_rule("HuberLossBackward0")
def huber(op: Operation, g: Value, h: Value) -> Any:
    """``l' = clamp(x - t, -delta, delta)``; ``l'' = 1`` inside, 0 outside."""
    d, delta = op.input(0, "self") - op.input(1, "target"), op.number("delta")
    return (_reduced(op, g, h, d.clamp(-delta, delta), (d.abs() <= delta).to(d.dtype)),) * 2


@register_rule("SmoothL1LossBackward0")
def smooth_l1(op: Operation, g: Value, h: Value) -> Any:
    """``l' = clamp((x - t) / beta, -1, 1)``; ``l'' = 1 / beta`` inside, 0 outside."""
    d, beta = op.input(0, "self") - op.input(1, "target"), op.number("beta")
    return (_reduced(op, g, h, (d / beta).clamp(-1, 1), (d.abs() < beta).to(d.dtype) / beta),) * 2


@register_rule("SoftMarginLossBackward0")
def soft_margin(op: Operation, g: Value, h: Value) -> Any:
    """``l = log(1 + exp(-t x))``, with ``s = sigmoid(-t x)``: ``l' = -t s``, ``l'' = t^2 s (1 - s)``."""
    t = op.tensor("target")
    s = (-t * op.input(0, "self")).sigmoid()
    return _reduced(op, g, h, -t * s, t * t * s * (1 - s)), *[None] * (len(op.needs) - 1)


# -- binary cross-entropy: curved in the target as well, and entrywise in both, so that paths may meet in it -----------


@register_rule("BinaryCrossEntropyBackward0", elementwise=True, reduces=True)
def bce(op: Operation) -> Any:
    """``l_x = (x - t) / v``, ``l_xx = t / x^2 + (1 - t) / (1 - x)^2`` with ``v = x (1 - x)``; ``l_t = -logit x``.

    Like torch's gradient, ``v`` is kept above 1e-12.
    """
    x, t = op.input(0, "self"), op.input(1, "target")
    w, c = op.tensor("weight"), _scale(op)
    w = c if w is None else w * c
    v = (x * (1 - x)).clamp(min=1e-12)
    by_x, by_t = (x - t) / v, ((1 - x).log().clamp(min=-100) - x.log().clamp(min=-100) if op.need(1) else None)
    # the two terms of l_xx over their common denominator
    bend = (t * (1 - x) * (1 - x) + (1 - t) * x * x) / (v * v)
    return (by_x * w, by_t if by_t is None else by_t * w), {(0, 0): bend * w, (0, 1): -w / v}


@register_rule("BinaryCrossEntropyWithLogitsBackward0", elementwise=True, reduces=True)
def bce_with_logits(op: Operation) -> Any:
    """With ``s = sigmoid(x)``, ``k = pos_weight``, ``c = 1 + (k - 1) t``: ``l_x = c s - k t``, ``l_xx = c s (1 - s)``.

    In the target ``l_t = (k - 1) softplus(-x) - x``, and ``l_xt = (k - 1) s - k``.
    """
    x, t, k = op.input(0, "self"), op.input(1, "target"), op.tensor("pos_weight")
    w, scale = op.tensor("weight"), _scale(op)
    w = scale if w is None else w * scale
    s = x.sigmoid()
    if k is None:
        by_t = -x * w if op.need(1) else None
        return ((s - t) * w, by_t), {(0, 0): (s - s * s) * w, (0, 1): -1.0 * w}
    c = 1 + (k - 1) * t
    by_t = ((k - 1) * torch.nn.functional.softplus(-x) - x) * w if op.need(1) else None
    return ((c * s - k * t) * w, by_t), {(0, 0): c * (s - s * s) * w, (0, 1): ((k - 1) * s - k) * w}


# -- losses over classes and sequences ---------------------------------------------------------------------------------


@register_rule(*_nll_backward)
def nll(op: Operation, h: Value) -> Value:
    """Linear: the target's entry gets ``(w / W)^2 h``, with ``W`` the mean's divisor (else 1)."""
    x, target, w, divisor = (op.input(0, "self"), *(op.tensor(n) for n in ("target", "weight", "total_weight")))
    square = None if w is None else w * w
    backward = _nll_backward[op.name]
    return -backward(h, x, target, square, op.number("reduction"), op.number("ignore_index"), divisor * divisor)


@register_rule("MultiMarginLossBackward0", curved=lambda op: op.number("p") == 2)
def multi_margin(op: Operation, g: Value, h: Value) -> Value:
    """``l = w sum_k max(0, margin - x_y + x_k)^p / C``: with p = 2 each active k adds ``2 w / C`` at k and at y."""
    x, target, weight = op.input(0, "self"), op.tensor("target"), op.tensor("weight")
    p, margin, reduction = op.number("p"), op.number("margin"), op.number("reduction")
    ones = x.new_ones(x.shape[:-1] if reduction == 0 else ())

    def slope(order: int) -> Value:
        return _multi_margin_backward(ones, x, target, order, margin, weight, reduction)

    g, h = (t if t is ZERO or t.dim() == 0 else t.unsqueeze(-1) for t in (g, h))
    passed = ZERO if h is ZERO else slope(p) * slope(p) * h
    if p == 1 or g is ZERO:
        return passed
    return passed + 2 * slope(1).abs() * g  # active ones at k, their number at y, all times w / C


@register_rule("MultilabelMarginLossBackward0")
def multilabel_margin(op: Operation, h: Value) -> Value:
    """Piecewise linear, and every entry acts on one output: the gradient of a unit, squared."""
    x, target, is_target = op.input(0, "self"), op.tensor("target"), op.tensor("is_target")
    ones = torch.ones_like(h)
    slope = _multilabel_margin_backward(ones, x, target, op.number("reduction"), is_target.to(x.dtype))
    return slope * slope * (h.unsqueeze(-1) if h.dim() else h)


@register_rule("CtcLossBackward0", "CtcLossBackward1")
def ctc(op: Operation, g: Value, h: Value) -> Value:
    """With ``p = exp(x)`` and a label's posterior ``q`` at each time: ``(p - q)^2 h + [p (1 - p) - q (1 - q)] g``.

    Torch takes the log-probabilities for normalised and has ``p - q`` for the gradient, that of the loss of the logits.
    This is the second derivative that belongs to it: the logits' curvature is made here, and log_softmax adds none.
    """
    x = op.input(0, "log_probs")
    lengths = [
        op.tensor(name) if op.saves_tensor(name) else op.number(name) for name in ("input_lengths", "target_lengths")
    ]
    loss, alpha = op.output("result0"), op.tensor("result1")
    rest = loss, alpha, op.number("blank"), op.number("zero_infinity")
    slope = _ctc_backward(torch.ones_like(loss), x, op.tensor("targets"), *lengths, *rest)
    passed = ZERO if h is ZERO else slope * slope * h[..., None]
    if g is ZERO:
        return passed
    # with q = p - slope; slope is zero after a sequence's end, where q = p
    return passed + slope * (1 - 2 * x.exp() + slope) * g[..., None]
