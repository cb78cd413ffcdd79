"""Softmax and log-softmax: exact local diagonals in closed form, linear cost.

Becker and LeCun's recursion treats both as if they were pointwise; ``method="bl89"`` does so here, and nowhere else
does that method differ from HesScale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_WRAP = 2**64  # a node shows a negative dimension as an unsigned number


def _dim(op: Operation) -> int:
    dim: int | None = op.node._saved_dim
    if dim is None:
        return -1
    return dim - _WRAP if dim > _WRAP >> 1 else dim


@register_rule("LogSoftmaxBackward0", curved=True)
def log_softmax(op: Operation) -> Formula:
    """``h_i (1 - 2 p_i) + p_i^2 sum_k h_k - (p_i - p_i^2) sum_k g_k``; BL89 ``(1 - p)^2 h - (p - p^2) g``."""
    result, dim = op.node._saved_result, _dim(op)
    if op.method == "bl89":
        return _log_softmax_pointwise(result)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = full(result).exp()
        made = None if g is None else torch.addcmul(p, p, p, value=-1).mul_(g.sum(dim, keepdim=True)).neg_()
        if h is None:
            return (made,)
        passed = torch.addcmul(h, p, h, value=-2).addcmul_(p * p, h.sum(dim, keepdim=True))
        return (passed if made is None else passed.add_(made),)

    return formula


def _log_softmax_pointwise(result: Tensor) -> Formula:
    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = full(result).exp()
        made = None if g is None else torch.addcmul(p, p, p, value=-1).mul_(g).neg_()
        if h is None:
            return (made,)
        passed = (1 - p).square_().mul_(h)
        return (passed if made is None else passed.add_(made),)

    return formula


@register_rule("SoftmaxBackward0", "SafeSoftmaxBackward0", "MaskedSoftmaxBackward0", curved=True)
def softmax(op: Operation) -> Formula:
    """``p^2 (sum p^2 h + h (1 - 2 p)) + p (1 - 2 p) (g - sum p g)``; BL89 ``(p - p^2)^2 h + (p - p^2) (1 - 2 p) g``."""
    result, dim = op.node._saved_result, _dim(op)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = full(result)
        square = p * p
        total = None
        if h is not None:
            total = torch.addcmul(h, p, h, value=-2).add_((square * h).sum(dim, keepdim=True)).mul_(square)
        if g is not None:
            made = (g - (p * g).sum(dim, keepdim=True)).mul_(torch.add(p, square, alpha=-2))
            total = made if total is None else total.add_(made)
        return (total,)

    def pointwise(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = full(result)
        slope = torch.addcmul(p, p, p, value=-1)
        total = None
        if h is not None:
            total = (slope * h).mul_(slope)
        if g is not None:
            made = torch.addcmul(slope, slope, p, value=-2).mul_(g)
            total = made if total is None else total.add_(made)
        return (total,)

    return pointwise if op.method == "bl89" else formula
