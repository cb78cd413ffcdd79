"""Operations that pick entries by value: maxima, medians, sorting.

A picked entry has the coefficient 1. Where autograd distributes the gradient among n entries that are tied, they have
the coefficient 1/n, and its square counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import dim_of, signed


@register_rule(
    "KthvalueBackward0", "MaxBackward0", "MedianBackward1", "MinBackward0", "ModeBackward0", "NanmedianBackward1",
    "SortBackward0", "SortBackward1", "TopkBackward0",
)  # fmt: skip
def pick_along_dim(op: Operation) -> Formula:
    """One entry for each output, whose index was saved; ties are broken."""
    node = op.node
    dim, at, shape = dim_of(op), node._saved_indices, node._saved_self_sym_sizes
    if len(shape) > at.ndim:
        at = at.unsqueeze(dim)
        return lambda h: (h.new_zeros(shape).scatter_(dim, at, h.unsqueeze(dim)),)
    return lambda h: (h.new_zeros(shape).scatter_(dim, at, h),)


@register_rule("CummaxBackward0", "CumminBackward0")
def running_extremum(op: Operation) -> Formula:
    """An entry that is the extremum of several outputs sums them."""
    dim, at = dim_of(op), op.node._saved_indices
    return lambda h: (torch.zeros_like(h).scatter_add_(dim, at, h),)


@register_rule("MaxBackward1", "MedianBackward0", "MinBackward1", "NanmedianBackward0")
def pick_of_all(op: Operation) -> Formula:
    """The n tied entries have the coefficient 1/n."""
    tied = op.node._saved_self == op.node._saved_result
    return lambda h: (tied * (h / tied.sum().square()),)


@register_rule("AmaxBackward0", "AminBackward0")
def extremum(op: Operation) -> Formula:
    """As :func:`pick_of_all`, along several dimensions."""
    node = op.node
    x, result, keepdim = node._saved_self, node._saved_result, node._saved_keepdim
    dims = [signed(dim) for dim in node._saved_dim] or list(range(x.ndim))
    part = _extremum(x, result, dims, keepdim)
    return lambda h: (part(h),)


@register_rule("AminmaxBackward0", multi_output=True)
def aminmax(op: Operation) -> Formula:
    """Both of :func:`extremum`."""
    node = op.node
    x, keepdim = node._saved_self, node._saved_keepdim
    dims = list(range(x.ndim)) if node._saved_dim is None else [signed(node._saved_dim)]
    lower, upper = (_extremum(x, result, dims, keepdim) for result in (node._saved_min, node._saved_max))

    def formula(h: tuple[Tensor | None, Tensor | None]) -> Diagonals:
        h_min, h_max = h
        if h_min is None:
            return (upper(h_max),)
        return (lower(h_min) if h_max is None else lower(h_min) + upper(h_max),)

    return formula


def _extremum(x: Tensor, result: Tensor, dims: list[int], keepdim: bool) -> Any:
    shape = list(x.shape)
    for dim in dims:
        shape[dim] = 1
    tied = x == result.view(shape)
    return lambda h: tied * (h.reshape(shape) / tied.sum(dims, keepdim=True).square())
