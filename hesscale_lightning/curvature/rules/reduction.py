"""Sums and products over dimensions, whole or running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value, opaque

_cumprod_backward = torch.ops.aten.cumprod_backward.default


def reduced_dims(saved: Any, rank: int) -> list[int]:
    """The dimensions that a node saved, in ascending order and from zero; all of them where it saved none."""
    dims = [] if saved is None else list(saved) if isinstance(saved, Sequence) else [saved]
    return sorted(d % max(rank, 1) for d in dims) or list(range(rank))


def spread(x: Value, dims: Sequence[int], keepdim: bool, rank: int) -> Value:
    """A result of a reduction, with its reduced dimensions back as ones, so that it broadcasts to the input."""
    if not keepdim and rank:
        for d in dims:
            x = x.unsqueeze(d)
    return x


def lowered(op: Operation, x: Value) -> Value:
    """A curvature in the dtype of the input's, which ``dtype=`` may have left for another."""
    dtype = op.input_dtype(0)
    return x if x is ZERO or x.dtype is dtype else x.to(dtype)


# -- sums --------------------------------------------------------------------------------------------------------------


@register_rule("SumBackward0", "SumBackward1")
def total(op: Operation, h: Value) -> Value:
    """Every Jacobian entry is 0 or 1, and the node, which saves sizes only, expands."""
    return op.backward(lowered(op, h))


@register_rule("CumsumBackward0")
def cumsum(op: Operation, h: Value) -> Value:
    """Every Jacobian entry is 0 or 1, so that ``h_i = sum_(j >= i) h_j``, not rounded to the input as by the node."""
    h, dim = lowered(op, h), op.number("dim")
    return h.flip(dim).cumsum(dim).flip(dim) if h.dim() else h


@register_rule("NansumBackward0")
def nansum(op: Operation, h: Value) -> Value:
    """As a sum, zero for the entries left out."""
    x = op.input(0, "self")
    rank = x.dim()
    dims = reduced_dims(op.number("dim"), rank)
    return spread(lowered(op, h), dims, op.number("keepdim"), rank).expand(x.shape).masked_fill(x.isnan(), 0)


@register_rule("MeanBackward0", "MeanBackward1")
def mean(op: Operation, h: Value) -> Value:
    """``h / n^2``; the node divides by ``n`` once."""
    count = op.input_shape(0).numel() / max(op.output_shape().numel(), 1)
    return op.backward(lowered(op, h) / count)


@register_rule("LogsumexpBackward0")
def logsumexp(op: Operation, g: Value, h: Value) -> Value:
    """``p^2 h + (p - p^2) g`` with ``p = softmax(x)``."""
    x, keepdim = op.input(0, "self"), op.number("keepdim")
    rank = x.dim()
    dims = reduced_dims(op.number("dim"), rank)
    p = (x - spread(op.output("result"), dims, keepdim, rank)).exp()
    g, h = (spread(t, dims, keepdim, rank) for t in (g, h))
    return p * p * h + (p - p * p) * g


@register_rule("LogcumsumexpBackward0")
def logcumsumexp(op: Operation, g: Value, h: Value) -> Value:
    """With ``p_ji = exp(x_i - y_j)``: ``h_i = sum_(j >= i) p_ji^2 h_j + (p_ji - p_ji^2) g_j``."""
    x, y, dim = op.input(0, "self"), op.output("result"), op.number("dim")
    passed = ZERO if h is ZERO else _later(x, y, h, 2, dim)
    return passed if g is ZERO else passed + (_later(x, y, g, 1, dim) - _later(x, y, g, 2, dim))


def _later(x: Value, y: Value, weight: Value, power: int, dim: int) -> Value:
    """``sum_(j >= i) exp(power (x_i - y_j)) weight_j``, in logarithms, positive and negative weights apart."""

    def summed(part: Value) -> Value:
        return (part.clamp(min=0).log() - power * y).flip(dim).logcumsumexp(dim).flip(dim)

    return (summed(weight) + power * x).exp() - (summed(-weight) + power * x).exp()


# -- products: linear in each factor, so there is no second derivative -------------------------------------------------


@register_rule("ProdBackward0")
def prod(op: Operation, h: Value) -> Value:
    """``(prod_(k != i) x_k)^2 h``, without a division, so that factors may be zero."""
    x = op.input(0, "self").to(h.dtype)
    return lowered(op, (_other_factors((x * x).flatten(), 0) * h).view(x.shape) if x.dim() else h)


@register_rule("ProdBackward1")
def prod_along(op: Operation, h: Value) -> Value:
    """``(prod_(k != i) x_k)^2 h`` along a dimension."""
    x = op.input(0, "self").to(h.dtype)
    rank = x.dim()
    if not rank:
        return lowered(op, h)
    dim = op.number("dim") % rank
    return lowered(op, _other_factors(x * x, dim) * spread(h, [dim], op.number("keepdim"), rank))


@opaque
def _other_factors(x: Tensor, dim: int) -> Tensor:
    """For each entry the product of all others along ``dim``: those before it times those after it."""
    if not x.numel():
        return x.clone()
    before = x.roll(1, dim)
    before.select(dim, 0).fill_(1)
    after = x.flip(dim).roll(1, dim)
    after.select(dim, 0).fill_(1)
    return before.cumprod(dim).mul_(after.cumprod(dim).flip(dim))


@register_rule("CumprodBackward0")
def cumprod(op: Operation, h: Value) -> Value:
    """The Jacobian's entries are products of inputs, so their squares are those of the squared inputs."""
    y = op.output("result")
    x = op.input(0, "self").to(y.dtype)
    return lowered(op, _cumprod_backward(h, x * x, op.number("dim"), y * y))
