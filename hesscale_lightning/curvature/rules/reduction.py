"""Sums and products over dimensions, whole or running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import signed

_cumprod_backward = torch.ops.aten.cumprod_backward.default


def reduced_dims(saved: Any, rank: int) -> list[int]:
    """The dimensions that a node saved, in ascending order and from zero; all of them where it saved none."""
    dims = [] if saved is None else list(saved) if isinstance(saved, Sequence) else [saved]
    return sorted(signed(d) % max(rank, 1) for d in dims) or list(range(rank))


def spread(x: Tensor, dims: Sequence[int], keepdim: bool, rank: int) -> Tensor:
    """A result of a reduction, with its reduced dimensions back as ones, so that it broadcasts to the input."""
    if not keepdim and rank:
        for d in dims:
            x = x.unsqueeze(d)
    return x


def curve(first: Any, second: Any, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """``first^2 h + second g``, either of which may be missing."""
    total = None if h is None or first is None else first * first * h
    if g is not None and second is not None:
        made = second * g
        total = made if total is None else total + made
    return total


# -- sums --------------------------------------------------------------------------------------------------------------


@register_rule("SumBackward0", "SumBackward1")
def total(op: Operation) -> Formula:
    """Every Jacobian entry is 0 or 1, and the node, which saves sizes only, expands."""
    node = op.node
    return lambda h: (node(h),)


@register_rule("NansumBackward0")
def nansum(op: Operation) -> Formula:
    """As a sum, zero for the entries left out."""
    node = op.node
    x, keepdim = node._saved_self, node._saved_keepdim
    rank, left_out = x.dim(), x.isnan()
    dims = reduced_dims(node._saved_dim, rank)
    return lambda h: (spread(h, dims, keepdim, rank).expand(left_out.shape).masked_fill(left_out, 0),)


@register_rule("MeanBackward0", "MeanBackward1")
def mean(op: Operation) -> Formula:
    """``h / n^2``; the node divides by ``n`` once."""
    node = op.node
    count = op.input_shape(0).numel() / max(op.output_shape().numel(), 1)
    return lambda h: (node(h).div_(count),)


@register_rule("CumsumBackward0")
def cumsum(op: Operation) -> Formula:
    """Every Jacobian entry is 0 or 1."""
    node = op.node
    return lambda h: (node(h),)


@register_rule("LogsumexpBackward0", curved=True)
def logsumexp(op: Operation) -> Formula:
    """``p^2 h + (p - p^2) g`` with ``p = softmax(x)``."""
    node = op.node
    saved, result, keepdim = node._saved_self, node._saved_result, node._saved_keepdim
    rank = saved.dim()
    dims = reduced_dims(node._saved_dim, rank)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        p = torch.exp(full(saved) - spread(full(result), dims, keepdim, rank))
        square = p * p
        result_h = square * spread(h, dims, keepdim, rank) if h is not None else None
        if g is not None:
            term = (p - square).mul_(spread(g, dims, keepdim, rank))
            result_h = term if result_h is None else result_h.add_(term)
        return (result_h,)

    return formula


@register_rule("LogcumsumexpBackward0", curved=True)
def logcumsumexp(op: Operation) -> Formula:
    """With ``p_ji = exp(x_i - y_j)``: ``h_i = sum_(j >= i) p_ji^2 h_j + (p_ji - p_ji^2) g_j``."""
    saved, result, dim = op.node._saved_self, op.node._saved_result, signed(op.node._saved_dim)

    def later(x: Tensor, y: Tensor, weight: Tensor, power: int) -> Tensor:
        """``sum_(j >= i) exp(power (x_i - y_j)) weight_j``, in logarithms, positive and negative weights apart."""

        def summed(part: Tensor) -> Tensor:
            return (part.clamp(min=0).log() - power * y).flip(dim).logcumsumexp(dim).flip(dim)

        return torch.exp(summed(weight) + power * x) - torch.exp(summed(-weight) + power * x)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        x, y = full(saved), full(result)
        passed = None if h is None else later(x, y, h, 2)
        made = None if g is None else later(x, y, g, 1) - later(x, y, g, 2)
        return (made if passed is None else passed if made is None else passed + made,)

    return formula


# -- products: linear in each factor, so there is no second derivative -------------------------------------------------


@register_rule("ProdBackward0", "ProdBackward1")
def prod(op: Operation) -> Formula:
    """``(prod_(k != i) x_k)^2 h``, without a division, so that factors may be zero."""
    node = op.node
    saved, shape = node._saved_self, node._saved_self.shape
    if not shape:
        return lambda h: (h,)
    if node.name() == "ProdBackward0":
        return lambda h: ((_other_factors(squared(saved.to(h.dtype)).flatten(), 0) * h).view(shape),)
    dim, keepdim = signed(node._saved_dim) % len(shape), node._saved_keepdim
    return lambda h: (_other_factors(squared(saved.to(h.dtype)), dim) * spread(h, [dim], keepdim, len(shape)),)


def _other_factors(x: Tensor, dim: int) -> Tensor:
    """For each entry the product of all others along ``dim``: those before it times those after it."""
    before = x.roll(1, dim)
    before.select(dim, 0).fill_(1)
    after = x.flip(dim).roll(1, dim)
    after.select(dim, 0).fill_(1)
    return before.cumprod(dim).mul_(after.cumprod(dim).flip(dim))


@register_rule("CumprodBackward0")
def cumprod(op: Operation) -> Formula:
    """The Jacobian's entries are products of inputs, so their squares are those of the squared inputs."""
    saved, result, dim = op.node._saved_self, op.node._saved_result, signed(op.node._saved_dim)
    return lambda h: (_cumprod_backward(h, squared(saved.to(result.dtype)), dim, squared(result)),)
