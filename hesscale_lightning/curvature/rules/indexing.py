"""Operations that pick entries by index or mask, and those that put entries in place.

As in :mod:`~hesscale_lightning.curvature.rules.shape`, every output is a copy of one input entry, or a sum of several,
so ``h_x = J^T h``; an entry picked twice sums both. Only indices and masks are kept, not the tensors they came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import as_inputs, dim_of

_aten = torch.ops.aten
_index = _aten.index.Tensor  # the bindings of Tensor.__getitem__ take no list with gaps
_index_put = _aten.index_put.default
_index_put_ = _aten.index_put_.default
_masked_scatter_backward = _aten.masked_scatter_backward.default

_NONE = torch.Size()  # the shape of an input whose curvature is not needed


# -- picking by index or mask ----------------------------------------------------------------------------------------


@register_rule("IndexBackward0", "UnsafeIndexBackward0", view=True)
def index(op: Operation) -> Formula:
    """``y = x[indices]``."""
    indices, shape = op.node._saved_indices, op.node._saved_self_sym_sizes
    return lambda h: (_index_put_(h.new_zeros(shape), indices, h, True),)


@register_rule("IndexSelectBackward0", view=True)
def index_select(op: Operation) -> Formula:
    """``y[.., k, ..] = x[.., index[k], ..]``."""
    dim, at, shape = dim_of(op), op.node._saved_index, op.node._saved_self_sym_sizes
    return lambda h: (h.new_zeros(shape).index_add_(dim, at, h),)


@register_rule("GatherBackward0", view=True)
def gather(op: Operation) -> Formula:
    """``y[k, j] = x[index[k, j], j]``."""
    dim, at, shape = dim_of(op), op.node._saved_index, op.input_shape(0)
    return lambda h: (h.new_zeros(shape).scatter_add_(dim, at, h),)


@register_rule("TakeBackward0", view=True)
def take(op: Operation) -> Formula:
    """``y[k] = x.flatten()[index[k]]``."""
    at, shape = op.node._saved_index, op.input_shape(0)
    return lambda h: (h.new_zeros(shape).put_(at, h, accumulate=True),)


@register_rule("MaskedSelectBackward0", view=True)
def masked_select(op: Operation) -> Formula:
    """``y = x[mask]``; x and mask may have been broadcast."""
    mask, shape = op.node._saved_mask, op.input_shape(0)
    both = torch.broadcast_shapes(mask.shape, shape)
    return lambda h: (h.new_zeros(both).masked_scatter_(mask, h).sum_to_size(shape),)


@register_rule("WhereBackward0")
def where(op: Operation) -> Formula:
    """``y`` is a where the condition holds, else b; either may have been broadcast."""
    condition = op.node._saved_condition
    need_a, need_b = op.needs
    shape_a = op.input_shape(0) if need_a else _NONE
    shape_b = op.input_shape(1) if need_b else _NONE

    def formula(h: Tensor) -> Diagonals:
        return (
            torch.where(condition, h, 0).sum_to_size(shape_a) if need_a else None,
            torch.where(condition, 0, h).sum_to_size(shape_b) if need_b else None,
        )

    return as_inputs(op, formula)


# -- putting in place ------------------------------------------------------------------------------------------------


@register_rule("IndexPutBackward0", "IndexPutImplBackward0", "UnsafeIndexPutBackward0")
def index_put(op: Operation) -> Formula:
    """``y[indices] = values`` or ``y[indices] += values``; values may have been broadcast."""
    indices, accumulate = op.node._saved_indices, op.node._saved_accumulate
    need_x, need_values = op.needs
    shape = op.input_shape(1) if need_values else _NONE

    def formula(h: Tensor) -> Diagonals:
        return (
            (h if accumulate else _index_put(h, indices, h.new_zeros(()))) if need_x else None,
            _index(h, indices).sum_to_size(shape) if need_values else None,
        )

    return formula


@register_rule("IndexAddBackward0")
def index_add(op: Operation) -> Formula:
    """``y[index] += alpha source``."""
    dim, at, alpha = dim_of(op), op.node._saved_index, op.node._saved_alpha
    need_x, need_source = op.needs
    shape = op.input_shape(1) if need_source else _NONE

    def formula(h: Tensor) -> Diagonals:
        h_source = None
        if need_source:
            h_source = h.index_select(dim, at).view(shape)
            if alpha != 1:
                h_source = h_source * alpha**2
        return h if need_x else None, h_source

    return formula


@register_rule("IndexCopyBackward0")
def index_copy(op: Operation) -> Formula:
    """``y[index] = source``."""
    dim, at = dim_of(op), op.node._saved_index
    need_x, need_source = op.needs
    shape = op.input_shape(1) if need_source else _NONE

    def formula(h: Tensor) -> Diagonals:
        return (
            h.index_fill(dim, at, 0) if need_x else None,
            h.index_select(dim, at).view(shape) if need_source else None,
        )

    return formula


@register_rule("IndexFillBackward0")
def index_fill(op: Operation) -> Formula:
    """``y[index] = number``."""
    dim, at = dim_of(op), op.node._saved_index
    return lambda h: (h.index_fill(dim, at, 0),)


@register_rule("IndexFillBackward1")
def index_fill_with_tensor(op: Operation) -> Formula:
    """``y[index] = value``, a tensor with one element."""
    dim, at = dim_of(op), op.node._saved_index.unique()
    need_x, need_value = op.needs

    def formula(h: Tensor) -> Diagonals:
        return (
            h.index_fill(dim, at, 0) if need_x else None,
            h.index_select(dim, at).sum() if need_value else None,
        )

    return formula


@register_rule("ScatterBackward0")
def scatter(op: Operation) -> Formula:
    """``y[index[k, j], j] = source[k, j]``, where, as for autograd, no two sources go to one place."""
    dim, at = dim_of(op), op.node._saved_index
    need_x, need_source = op.needs

    def formula(h: Tensor) -> Diagonals:
        return h.scatter(dim, at, 0) if need_x else None, h.gather(dim, at) if need_source else None

    return formula


@register_rule("ScatterBackward1")
def scatter_number(op: Operation) -> Formula:
    """``y[index[k, j], j] = number``."""
    dim, at = dim_of(op), op.node._saved_index
    return lambda h: (h.scatter(dim, at, 0),)


@register_rule("ScatterAddBackward0")
def scatter_add(op: Operation) -> Formula:
    """``y[index[k, j], j] += source[k, j]``."""
    dim, at = dim_of(op), op.node._saved_index
    need_x, need_source = op.needs

    def formula(h: Tensor) -> Diagonals:
        return h if need_x else None, h.gather(dim, at) if need_source else None

    return formula


@register_rule("PutBackward0")
def put(op: Operation) -> Formula:
    """``y.flatten()[index] = source``, or ``+=``."""
    at, accumulate = op.node._saved_index, op.node._saved_accumulate
    need_x, need_source = op.needs
    shape = op.input_shape(1) if need_source else _NONE

    def formula(h: Tensor) -> Diagonals:
        return (
            (h if accumulate else h.put(at, h.new_zeros(at.shape))) if need_x else None,
            h.take(at).view(shape) if need_source else None,
        )

    return formula


@register_rule("MaskedScatterBackward0")
def masked_scatter(op: Operation) -> Formula:
    """``y[mask] = source``, as many of its first entries as are needed."""
    mask, shape = op.node._saved_mask, op.node._saved_source_sym_sizes
    need_x, need_source = op.needs

    def formula(h: Tensor) -> Diagonals:
        return (
            h.masked_fill(mask, 0) if need_x else None,
            _masked_scatter_backward(h, mask, shape) if need_source else None,
        )

    return formula


@register_rule("ScatterReduceBackward0", "IndexReduceBackward0")
def reduce_into(op: Operation) -> Formula:
    """``y`` is the sum, mean, maximum or minimum of what goes to one place, x itself included or not.

    A mean over n entries, and a tie between n, have the coefficient 1/n.
    """
    node = op.node
    x, at, dim, reduce, include = (
        node._saved_self, node._saved_index, dim_of(op), node._saved_reduce, node._saved_include_self,
    )  # fmt: skip
    if reduce == "prod":
        raise op.unsupported("the product of what goes to one place is not supported; sum, mean, amax and amin are")
    by_entry = node.name() == "ScatterReduceBackward0"
    source = node._saved_src if by_entry else node._saved_source

    def pick(a: Tensor) -> Tensor:
        return a.gather(dim, at) if by_entry else a.index_select(dim, at)

    def add(a: Tensor, b: Tensor) -> Tensor:
        return a.scatter_add(dim, at, b) if by_entry else a.index_add(dim, at, b)

    own: Any = 1
    sent: Any = 1
    n: Any = 1
    if reduce == "mean":
        n = add(torch.full_like(x, float(include)), torch.ones_like(source)).clamp_(min=1)
    elif reduce != "sum":
        own = (x == node._saved_result).to(x.dtype)
        sent = (source == pick(node._saved_result)).to(x.dtype)
        n = add(own, sent)
    need_x, need_source = op.needs

    def formula(h: Tensor) -> Diagonals:
        h_x = h_source = None
        h = h / (n * n)
        if need_source:
            h_source = pick(h) * sent
        if need_x:
            h_x = h * own
            if not include:
                h_x = h_x.scatter(dim, at, 0) if by_entry else h_x.index_fill(dim, at, 0)
        return h_x, h_source

    return formula
