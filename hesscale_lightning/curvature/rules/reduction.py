"""Sums over dimensions and what is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


@register_rule("SumBackward0", "SumBackward1")
def total(op: Operation) -> Formula:
    """Every Jacobian entry is 0 or 1, and the node, which saves sizes only, expands."""
    node = op.node
    return lambda h: (node(h),)


@register_rule("MeanBackward0", "MeanBackward1")
def mean(op: Operation) -> Formula:
    """``h / n^2``; the node divides by ``n`` once."""
    node = op.node
    count = op.input_shape(0).numel() / max(op.output_shape().numel(), 1)
    return lambda h: (node(h).div_(count),)


@register_rule("CumsumBackward0")
def cumsum(op: Operation) -> Formula:
    node = op.node
    return lambda h: (node(h),)


@register_rule("LogsumexpBackward0", curved=True)
def logsumexp(op: Operation) -> Formula:
    """``p^2 h + (p - p^2) g`` with ``p = softmax(x)``."""
    node = op.node
    saved, result, dims, keepdim = node._saved_self, node._saved_result, node._saved_dim, node._saved_keepdim
    dims = sorted(d % 2**64 for d in dims) if isinstance(dims, (tuple, list)) else [dims]
    rank = saved.dim()
    dims = sorted((d - 2**64 if d >= 2**63 else d) % max(rank, 1) for d in dims) or list(range(rank))

    def spread(x: Tensor) -> Tensor:
        if not keepdim and rank:
            for d in dims:
                x = x.unsqueeze(d)
        return x

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = torch.exp(full(saved) - spread(full(result)))
        square = p * p
        result_h = square * spread(h) if h is not None else None
        if g is not None:
            term = (p - square).mul_(spread(g))
            result_h = term if result_h is None else result_h.add_(term)
        return (result_h,)

    return formula
