"""Operations that pick entries by index or mask, and those that put entries in place.

As in :mod:`~hesscale_lightning.curvature.rules.shape`, every output is a copy of one input entry, or a sum of several,
so ``h_x = J^T h``; an entry picked twice sums both. Only indices and masks are kept, not the tensors they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import fitted
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value, opaque

_aten = torch.ops.aten
_index = _aten.index.Tensor  # the bindings of Tensor.__getitem__ take no list with gaps
_index_put = _aten.index_put.default
_index_put_ = _aten.index_put_.default
_masked_index = _aten._unsafe_masked_index.default
_masked_index_put = _aten._unsafe_masked_index_put_accumulate.default
_masked_scatter_backward = _aten.masked_scatter_backward.default


# -- picking by index or mask ----------------------------------------------------------------------------------------


@opaque
def _put_back(h: Tensor, shape: tuple[int, ...], indices: tuple[Tensor | None, ...]) -> Tensor:
    made: Tensor = _index_put_(h.new_zeros(shape), indices, h, True)
    return made


@register_rule("IndexBackward0", "UnsafeIndexBackward0", view=True)
def index(op: Operation, h: Value) -> Value:
    """``y = x[indices]``."""
    return _put_back(h, op.number("self_sym_sizes"), op.tensors("indices"))


@register_rule("UnsafeMaskedIndexBackward0", view=True)
def masked_index(op: Operation, h: Value) -> Value:
    """``y = x[indices]`` where a mask holds, else a number."""
    return _put_back_masked(h, op.number("self_sym_sizes"), op.tensor("mask"), op.tensors("indices"))


@opaque
def _put_back_masked(h: Tensor, shape: tuple[int, ...], mask: Tensor, indices: tuple[Tensor | None, ...]) -> Tensor:
    made: Tensor = _masked_index_put(h.new_zeros(shape), mask, indices, h)
    return made


@register_rule("UnsafeMaskedIndexPutAccumulateBackward0")
def masked_index_put(op: Operation, h: Value) -> Sequence[Value]:
    """``y[indices] += values`` where a mask holds."""
    values = _masked_index(h, op.tensor("mask"), op.tensors("indices"), 0) if op.need(1) else ZERO
    return h, values


@opaque
def _add_at(h: Tensor, shape: tuple[int, ...], dim: int, at: Tensor) -> Tensor:
    return h.new_zeros(shape).index_add_(dim, at, h)


@register_rule("IndexSelectBackward0", view=True)
def index_select(op: Operation, h: Value) -> Value:
    """``y[.., k, ..] = x[.., index[k], ..]``."""
    return _add_at(h, op.number("self_sym_sizes"), op.number("dim"), op.tensor("index"))


@opaque
def _scatter_back(h: Tensor, shape: tuple[int, ...], dim: int, at: Tensor) -> Tensor:
    return h.new_zeros(shape).scatter_add_(dim, at, h)


@register_rule("GatherBackward0", view=True)
def gather(op: Operation, h: Value) -> Value:
    """``y[k, j] = x[index[k, j], j]``."""
    return _scatter_back(h, tuple(op.input_shape(0)), op.number("dim"), op.tensor("index"))


@opaque
def _take_back(h: Tensor, shape: tuple[int, ...], at: Tensor) -> Tensor:
    return h.new_zeros(shape).put_(at, h, accumulate=True)


@register_rule("TakeBackward0", view=True)
def take(op: Operation, h: Value) -> Value:
    """``y[k] = x.flatten()[index[k]]``."""
    return _take_back(h, tuple(op.input_shape(0)), op.tensor("index"))


@opaque
def _fill_back(h: Tensor, shape: tuple[int, ...], mask: Tensor) -> Tensor:
    return h.new_zeros(shape).masked_scatter_(mask, h)


@register_rule("MaskedSelectBackward0", view=True)
def masked_select(op: Operation, h: Value) -> Value:
    """``y = x[mask]``; x and mask may have been broadcast."""
    mask, shape = op.tensor("mask"), op.input_shape(0)
    both = tuple(torch.broadcast_shapes(mask.shape, shape))
    return _fill_back(h, both, mask).sum_to_size(shape)


@register_rule("WhereBackward0")
def where(op: Operation, h: Value) -> Sequence[Value]:
    """``y`` is a where the condition holds, else b; either may have been broadcast."""
    condition = op.tensor("condition")
    return (
        fitted(op, 0, torch.where(condition, h, 0)) if op.need(0) else None,
        fitted(op, 1, torch.where(condition, 0, h)) if op.need(1) else None,
    )


# -- putting in place ------------------------------------------------------------------------------------------------


@register_rule("IndexPutBackward0", "IndexPutImplBackward0", "UnsafeIndexPutBackward0")
def index_put(op: Operation, h: Value) -> Sequence[Value]:
    """``y[indices] = values`` or ``y[indices] += values``; values may have been broadcast."""
    indices = op.tensors("indices")
    kept = h if op.number("accumulate") or not op.need(0) else _index_put(h, indices, h.new_zeros(()))
    return kept, _index(h, indices).sum_to_size(op.input_shape(1)) if op.need(1) else None


@register_rule("IndexAddBackward0")
def index_add(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index] += alpha source``."""
    sent = None
    if op.need(1):
        sent = h.index_select(op.number("dim"), op.tensor("index")).view(op.input_shape(1)) * op.number("alpha") ** 2
    return h, sent


@register_rule("IndexCopyBackward0")
def index_copy(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index] = source``."""
    dim, at = op.number("dim"), op.tensor("index")
    return (
        h.index_fill(dim, at, 0) if op.need(0) else None,
        h.index_select(dim, at).view(op.input_shape(1)) if op.need(1) else None,
    )


@register_rule("IndexFillBackward0", "IndexFillBackward1")
def index_fill(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index]`` is a number, or a tensor with one element."""
    dim, at = op.number("dim"), op.tensor("index")
    kept = h.index_fill(dim, at, 0)
    return (kept, fitted(op, 1, (h - kept).sum()) if op.need(1) else None)[: len(op.needs)]


@register_rule("ScatterBackward0", "ScatterBackward1")
def scatter(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index[k, j], j] = source[k, j]``, where, as for autograd, no two sources go to one place; or a number."""
    dim, at = op.number("dim"), op.tensor("index")
    kept = h.scatter(dim, at, 0) if op.need(0) else None
    return (kept, h.gather(dim, at) if op.need(1) else None)[: len(op.needs)]


@register_rule("ScatterAddBackward0")
def scatter_add(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index[k, j], j] += source[k, j]``."""
    return h, h.gather(op.number("dim"), op.tensor("index")) if op.need(1) else None


@register_rule("PutBackward0")
def put(op: Operation, h: Value) -> Sequence[Value]:
    """``y.flatten()[index] = source``, or ``+=``."""
    at = op.tensor("index")
    return (
        h if op.number("accumulate") else h.put(at, h.new_zeros(at.shape)),
        h.take(at).view(op.input_shape(1)) if op.need(1) else None,
    )


@register_rule("MaskedScatterBackward0")
def masked_scatter(op: Operation, h: Value) -> Sequence[Value]:
    """``y[mask] = source``, as many of its first entries as are needed; x may have been broadcast."""
    mask = op.tensor("mask")
    return (
        h.masked_fill(mask, 0).sum_to_size(op.input_shape(0)) if op.need(0) else None,
        _masked_scatter_backward(h, mask, op.number("source_sym_sizes")) if op.need(1) else None,
    )


@register_rule("ScatterReduceBackward0", "IndexReduceBackward0", bilinear=lambda op: op.number("reduce") == "prod")
def reduce_into(op: Operation, h: Value) -> Sequence[Value]:
    """``y`` is the sum, mean, product, maximum or minimum of what goes to one place, x itself included or not.

    A mean over n entries, and a tie between n, have the coefficient 1/n; a factor has the product of all others.
    """
    x, at, dim = op.input(0, "self"), op.tensor("index"), op.number("dim")
    reduce, include = op.number("reduce"), op.number("include_self")
    by_entry = op.name == "ScatterReduceBackward0"
    source = op.input(1, "src" if by_entry else "source")

    def pick(a: Value) -> Value:
        return a.gather(dim, at) if by_entry else a.index_select(dim, at)

    def add(a: Value, b: Value) -> Value:
        return a.scatter_add(dim, at, b) if by_entry else a.index_add(dim, at, b)

    own: Any = 1
    sent: Any = 1
    if reduce == "prod":
        own, sent = _other_factors(x, source, at, dim, include, by_entry)
    elif reduce == "mean":
        n = add(torch.full_like(x, float(include)), torch.ones_like(source)).clamp(min=1)
        h = h / (n * n)
    elif reduce != "sum":
        y = op.output("result")
        own, sent = (x == y).to(x.dtype), (source == pick(y)).to(x.dtype)
        n = add(own, sent)
        h = h / (n * n)
    h_x = h * own
    if not include:
        h_x = h_x.scatter(dim, at, 0) if by_entry else h_x.index_fill(dim, at, 0)
    return h_x, pick(h) * sent


@opaque
def _other_factors(
    x: Tensor, source: Tensor, at: Tensor, dim: int, include: bool, by_entry: bool
) -> tuple[Tensor, Tensor]:
    """Squared, for each factor the product of all others that go to the same place, also where some are zero."""
    shapes = x.shape, source.shape
    x, source, at = (t.view(-1) if t.dim() == 0 else t for t in (x, source, at))
    if not by_entry and source.dim():
        shape = [1] * source.dim()
        shape[dim] = -1
        at = at.view(shape).expand_as(source)

    def product_of(a: Tensor, own: Tensor) -> Tensor:
        start = own if include else torch.ones_like(own).where(torch.zeros_like(own).scatter(dim, at, 1) > 0, own)
        return start.scatter_reduce(dim, at, a, "prod", include_self=True)

    def counted(zeros: Tensor, own: Tensor) -> Tensor:
        start = own if include else own.scatter(dim, at, 0)
        return start.scatter_add(dim, at, zeros)

    squares, own = source * source, x * x
    at_zero, own_zero = squares == 0, own == 0
    others = product_of(squares.masked_fill(at_zero, 1), own.masked_fill(own_zero, 1))  # of those that are not zero
    zeros = counted(at_zero.to(x.dtype), own_zero.to(x.dtype))
    of_own = (others / own.masked_fill(own_zero, 1)).where(zeros == own_zero, 0.0)
    if not include:
        of_own = torch.ones_like(own)
    all_others = others.gather(dim, at) / squares.masked_fill(at_zero, 1)
    of_sent = all_others.where(zeros.gather(dim, at) == at_zero, 0.0)
    return of_own.view(shapes[0]), of_sent.view(shapes[1])
