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
from hesscale_lightning.curvature.values import Value, opaque

_aten = torch.ops.aten
_index = _aten.index.Tensor  # the bindings of Tensor.__getitem__ take no list with gaps
_index_put = _aten.index_put.default
_index_put_ = _aten.index_put_.default
_masked_scatter_backward = _aten.masked_scatter_backward.default
_unsafe_masked_index = _aten._unsafe_masked_index.default
_unsafe_masked_index_put_accumulate = _aten._unsafe_masked_index_put_accumulate.default


# -- picking by index or mask ----------------------------------------------------------------------------------------


@opaque
def into_zeros(like: Tensor, shape: Sequence[int], method: str, *arguments: Any) -> Tensor:
    """Zeros of ``shape``, and of the dtype of ``like``, after an in-place method."""
    changed: Tensor = getattr(like.new_zeros(shape), method)(*arguments)
    return changed


@opaque
def _added_at(indices: tuple[Tensor | None, ...], h: Tensor, shape: Sequence[int]) -> Tensor:
    added: Tensor = _index_put_(h.new_zeros(shape), indices, h, True)
    return added


@register_rule("IndexBackward0", "UnsafeIndexBackward0", view=True)
def index(op: Operation, h: Value) -> Value:
    """``y = x[indices]``."""
    return _added_at(op.tensors("indices"), h, op.number("self_sym_sizes"))


@register_rule("UnsafeMaskedIndexBackward0", view=True)
def unsafe_masked_index(op: Operation, h: Value) -> Value:
    """``y = x[indices]`` where the mask is True, else a number."""
    zeros = h.new_zeros(op.number("self_sym_sizes"))
    return _unsafe_masked_index_put_accumulate(zeros, op.tensor("mask"), op.tensors("indices"), h)


@register_rule("IndexSelectBackward0", view=True)
def index_select(op: Operation, h: Value) -> Value:
    """``y[.., k, ..] = x[.., index[k], ..]``."""
    return into_zeros(h, op.number("self_sym_sizes"), "index_add_", op.number("dim"), op.tensor("index"), h)


@register_rule("GatherBackward0", view=True)
def gather(op: Operation, h: Value) -> Value:
    """``y[k, j] = x[index[k, j], j]``."""
    return into_zeros(h, op.input_shape(0), "scatter_add_", op.number("dim"), op.tensor("index"), h)


@register_rule("TakeBackward0", view=True)
def take(op: Operation, h: Value) -> Value:
    """``y[k] = x.flatten()[index[k]]``."""
    return into_zeros(h, op.input_shape(0), "put_", op.tensor("index"), h, True)


@register_rule("MaskedSelectBackward0", view=True)
def masked_select(op: Operation, h: Value) -> Value:
    """``y = x[mask]``; x and mask may have been broadcast."""
    mask, shape = op.tensor("mask"), op.input_shape(0)
    return into_zeros(h, torch.broadcast_shapes(mask.shape, shape), "masked_scatter_", mask, h).sum_to_size(shape)


@register_rule("WhereBackward0")
def where(op: Operation, h: Value) -> Sequence[Value]:
    """``y`` is a where the condition holds, else b; either may have been broadcast."""
    condition = op.tensor("condition")
    return (
        op.need(0) and fitted(op, 0, torch.where(condition, h, 0)),
        op.need(1) and fitted(op, 1, torch.where(condition, 0, h)),
    )


# -- putting in place ------------------------------------------------------------------------------------------------


@register_rule("IndexPutBackward0", "IndexPutImplBackward0", "UnsafeIndexPutBackward0")
def index_put(op: Operation, h: Value) -> Sequence[Value]:
    """``y[indices] = values`` or ``y[indices] += values``; values may have been broadcast."""
    indices = op.tensors("indices")
    return (
        op.need(0) and (h if op.number("accumulate") else _index_put(h, indices, h.new_zeros(()))),
        op.need(1) and _index(h, indices).sum_to_size(op.input_shape(1)),
    )


@register_rule("UnsafeMaskedIndexPutAccumulateBackward0")
def unsafe_masked_index_put(op: Operation, h: Value) -> Sequence[Value]:
    """``y[indices] += values`` where the mask is True."""
    return h, op.need(1) and _unsafe_masked_index(h, op.tensor("mask"), op.tensors("indices"), 0)


@register_rule("IndexAddBackward0")
def index_add(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index] += alpha source``."""
    dim, at, alpha = op.number("dim"), op.tensor("index"), op.number("alpha")
    return h, op.need(1) and h.index_select(dim, at).view(op.input_shape(1)) * alpha**2


@register_rule("IndexCopyBackward0")
def index_copy(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index] = source``."""
    dim, at = op.number("dim"), op.tensor("index")
    return (
        op.need(0) and h.index_fill(dim, at, 0),
        op.need(1) and h.index_select(dim, at).view(op.input_shape(1)),
    )


@register_rule("IndexFillBackward0")
def index_fill(op: Operation, h: Value) -> Value:
    """``y[index] = number``."""
    return h.index_fill(op.number("dim"), op.tensor("index"), 0)


@register_rule("IndexFillBackward1")
def index_fill_with_tensor(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index] = value``, a tensor with one element."""
    dim, at = op.number("dim"), op.tensor("index")
    return (
        op.need(0) and h.index_fill(dim, at, 0),
        op.need(1) and fitted(op, 1, _sum_at(h, dim, at)),
    )


@opaque
def _sum_at(h: Tensor, dim: int, at: Tensor) -> Tensor:
    return h.index_select(dim, at.unique()).sum()


@register_rule("ScatterBackward0")
def scatter(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index[k, j], j] = source[k, j]``, where, as for autograd, no two sources go to one place."""
    dim, at = op.number("dim"), op.tensor("index")
    return op.need(0) and h.scatter(dim, at, 0), op.need(1) and h.gather(dim, at)


@register_rule("ScatterBackward1")
def scatter_number(op: Operation, h: Value) -> Value:
    """``y[index[k, j], j] = number``."""
    return h.scatter(op.number("dim"), op.tensor("index"), 0)


@register_rule("ScatterAddBackward0")
def scatter_add(op: Operation, h: Value) -> Sequence[Value]:
    """``y[index[k, j], j] += source[k, j]``."""
    return h, op.need(1) and h.gather(op.number("dim"), op.tensor("index"))


@register_rule("PutBackward0")
def put(op: Operation, h: Value) -> Sequence[Value]:
    """``y.flatten()[index] = source``, or ``+=``."""
    at = op.tensor("index")
    return (
        op.need(0) and (h if op.number("accumulate") else h.put(at, h.new_zeros(at.shape))),
        op.need(1) and h.take(at).view(op.input_shape(1)),
    )


@register_rule("MaskedScatterBackward0")
def masked_scatter(op: Operation, h: Value) -> Sequence[Value]:
    """``y[mask] = source``, as many of its first entries as are needed; x may have been broadcast."""
    mask = op.tensor("mask")
    return (
        op.need(0) and h.masked_fill(mask, 0).sum_to_size(op.input_shape(0)),
        op.need(1) and _masked_scatter_backward(h, mask, op.number("source_sym_sizes")),
    )


@register_rule("ScatterReduceBackward0", "IndexReduceBackward0", bilinear=True)
def reduce_into(op: Operation, h: Value) -> Sequence[Value]:
    """``y`` is the sum, mean, product, maximum or minimum of what goes to one place, x itself included or not.

    A mean over n entries, and a tie between n, have the coefficient 1/n; a factor has the product of the others.
    """
    by_entry = op.name == "ScatterReduceBackward0"
    reduce, dim, at = op.number("reduce"), op.number("dim"), op.tensor("index")
    x, y, source = op.input(0, "self"), op.output("result"), op.input(1, "src" if by_entry else "source")
    own, sent = _coefficients(reduce, x, y, source, dim, at, op.number("include_self"), by_entry)
    picked = op.need(1) and (h.gather(dim, at) if by_entry else h.index_select(dim, at))
    return op.need(0) and h * (own * own), op.need(1) and picked * (sent * sent)


@opaque
def _coefficients(
    reduce: str, x: Tensor, y: Tensor, source: Tensor, dim: int, at: Tensor, include_self: bool, by_entry: bool
) -> tuple[Tensor, Tensor]:
    """``dy/dx``, and ``dy/dsource`` at the place that each entry of the source goes to."""

    def pick(a: Tensor) -> Tensor:
        return a.gather(dim, at) if by_entry else a.index_select(dim, at)

    def add(a: Tensor, b: Tensor) -> Tensor:
        return a.scatter_add(dim, at, b) if by_entry else a.index_add(dim, at, b)

    def without_x(a: Tensor) -> Tensor:
        """Where x is not included, nothing is left of it wherever something goes."""
        if include_self:
            return a
        return a.scatter(dim, at, 0) if by_entry else a.index_fill(dim, at, 0)

    if reduce == "prod":  # of several zeros every product of the others is zero, of one only its own is not
        ones = torch.ones_like(x)
        own_zero, sent_zero = (x == 0).to(x.dtype), (source == 0).to(x.dtype)
        own_factor, sent_factor = x + own_zero, source + sent_zero
        if by_entry:
            sent_product = ones.scatter_reduce(dim, at, sent_factor, "prod")
        else:
            sent_product = ones.index_reduce(dim, at, sent_factor, "prod")
        sent_zeros = add(torch.zeros_like(x), sent_zero)
        own = without_x(sent_product * (sent_zeros == 0))
        product, zeros = sent_product, sent_zeros
        if include_self:
            product, zeros = sent_product * own_factor, sent_zeros + own_zero
        return own, pick(product) / sent_factor * (pick(zeros) == sent_zero)
    if reduce == "sum":
        return without_x(torch.ones_like(x)), torch.ones_like(source)
    if reduce == "mean":
        n = add(torch.full_like(x, float(include_self)), torch.ones_like(source)).clamp_(min=1)
        return without_x(1 / n), 1 / pick(n)
    own, sent = (x == y).to(x.dtype), (source == pick(y)).to(x.dtype)
    n = add(own, sent)  # as in torch, x takes a share that is lost where it is not included
    return without_x(own / n), sent / pick(n)
