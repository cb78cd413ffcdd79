"""Softmax and log-softmax: exact local diagonals in closed form, linear cost.

Becker and LeCun's recursion treats both as if they were pointwise; ``method="bl89"`` does so here, and nowhere else
does that method differ from HesScale.
"""

from __future__ import annotations

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value


def _dim(op: Operation) -> int:
    dim = op.number("dim")
    return -1 if dim is None else int(dim)


@register_rule("LogSoftmaxBackward0")
def log_softmax(op: Operation, g: Value, h: Value) -> Value:
    """``h_i (1 - 2 p_i) + p_i^2 sum_k h_k - (p_i - p_i^2) sum_k g_k``; BL89 ``(1 - p)^2 h - (p - p^2) g``."""
    p, dim = op.output("result").exp(), _dim(op)
    square = p * p
    if op.method == "bl89":
        return (1 - p) * (1 - p) * h - (p - square) * g
    return h - 2 * (p * h) + square * h.sum(dim, keepdim=True) + (square - p) * g.sum(dim, keepdim=True)


@register_rule("SoftmaxBackward0", "SafeSoftmaxBackward0", "MaskedSoftmaxBackward0")
def softmax(op: Operation, g: Value, h: Value) -> Value:
    """``p^2 (sum p^2 h + h (1 - 2 p)) + p (1 - 2 p) (g - sum p g)``; BL89 ``(p - p^2)^2 h + (p - p^2) (1 - 2 p) g``."""
    p, dim = op.output("result"), _dim(op)
    square = p * p
    if op.method == "bl89":
        slope = p - square
        return slope * (slope * h + (1 - 2 * p) * g)
    passed = square * ((square * h).sum(dim, keepdim=True) + (h - 2 * (p * h)))
    return passed + (p - 2 * square) * (g - (p * g).sum(dim, keepdim=True))
