"""Operations that pick entries by index, by mask or by value, and those that put entries in place.

As in :mod:`~hesscale_lightning.curvature.rules.shape`, every output is a copy of one input entry, or a sum of several,
so ``h_x = J^T h``; an entry picked twice sums both. Where an output is a mean over n entries (an average of embeddings,
or entries that are tied for a maximum, among which autograd distributes the gradient), the coefficients are 1/n and
their squares 1/n^2. Only indices and masks are kept, not the tensors that they came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import as_inputs, carried, signed

_aten = torch.ops.aten
_index = _aten.index.Tensor  # the bindings of Tensor.__getitem__ take no list with gaps
_index_put = _aten.index_put.default
_index_put_ = _aten.index_put_.default
_masked_scatter_backward = _aten.masked_scatter_backward.default
_embedding_dense_backward = _aten.embedding_dense_backward.default
_embedding_bag_backward = _aten._embedding_bag_backward.default
_embedding_bag_per_sample_weights_backward = _aten._embedding_bag_per_sample_weights_backward.default

_NONE = torch.Size()  # the shape of an input whose curvature is not needed


def _dim(op: Operation) -> int:
    return signed(op.node._saved_dim)


# -- picking by index or mask ------------------------------------------------------------------------------------------


@register_rule("IndexBackward0", "UnsafeIndexBackward0", view=True)
def index(op: Operation) -> Formula:
    """``y = x[indices]``."""
    indices, shape = op.node._saved_indices, op.node._saved_self_sym_sizes
    return lambda h: (_index_put_(h.new_zeros(shape), indices, h, True),)


@register_rule("IndexSelectBackward0", view=True)
def index_select(op: Operation) -> Formula:
    """``y[.., k, ..] = x[.., index[k], ..]``."""
    dim, at, shape = _dim(op), op.node._saved_index, op.node._saved_self_sym_sizes
    return lambda h: (h.new_zeros(shape).index_add_(dim, at, h),)


@register_rule("GatherBackward0", view=True)
def gather(op: Operation) -> Formula:
    """``y[k, j] = x[index[k, j], j]``."""
    dim, at, shape = _dim(op), op.node._saved_index, op.input_shape(0)
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


# -- picking by value --------------------------------------------------------------------------------------------------


@register_rule(
    "KthvalueBackward0", "MaxBackward0", "MedianBackward1", "MinBackward0", "ModeBackward0", "NanmedianBackward1",
    "SortBackward0", "SortBackward1", "TopkBackward0",
)  # fmt: skip
def pick_along_dim(op: Operation) -> Formula:
    """One entry for each output, whose index was saved; ties are broken."""
    node = op.node
    dim, at, shape = _dim(op), node._saved_indices, node._saved_self_sym_sizes
    if len(shape) > at.ndim:
        at = at.unsqueeze(dim)
        return lambda h: (h.new_zeros(shape).scatter_(dim, at, h.unsqueeze(dim)),)
    return lambda h: (h.new_zeros(shape).scatter_(dim, at, h),)


@register_rule("CummaxBackward0", "CumminBackward0")
def running_extremum(op: Operation) -> Formula:
    """An entry that is the extremum of several outputs sums them."""
    dim, at = _dim(op), op.node._saved_indices
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


# -- putting in place --------------------------------------------------------------------------------------------------


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
    dim, at, alpha = _dim(op), op.node._saved_index, op.node._saved_alpha
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
    dim, at = _dim(op), op.node._saved_index
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
    dim, at = _dim(op), op.node._saved_index
    return lambda h: (h.index_fill(dim, at, 0),)


@register_rule("IndexFillBackward1")
def index_fill_with_tensor(op: Operation) -> Formula:
    """``y[index] = value``, a tensor with one element."""
    dim, at = _dim(op), op.node._saved_index.unique()
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
    dim, at = _dim(op), op.node._saved_index
    need_x, need_source = op.needs

    def formula(h: Tensor) -> Diagonals:
        return h.scatter(dim, at, 0) if need_x else None, h.gather(dim, at) if need_source else None

    return formula


@register_rule("ScatterBackward1")
def scatter_number(op: Operation) -> Formula:
    """``y[index[k, j], j] = number``."""
    dim, at = _dim(op), op.node._saved_index
    return lambda h: (h.scatter(dim, at, 0),)


@register_rule("ScatterAddBackward0")
def scatter_add(op: Operation) -> Formula:
    """``y[index[k, j], j] += source[k, j]``."""
    dim, at = _dim(op), op.node._saved_index
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
        node._saved_self, node._saved_index, _dim(op), node._saved_reduce, node._saved_include_self,
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


# -- embeddings --------------------------------------------------------------------------------------------------------


def _refuse_what_is_no_gradient(op: Operation) -> None:
    if op.node._saved_sparse:
        raise op.unsupported("the diagonal of a sparse gradient is not supported; use sparse=False")
    if op.node._saved_scale_grad_by_freq:
        raise op.unsupported(
            "scale_grad_by_freq=True scales the gradient, which is then no longer that of the loss; use False"
        )


@register_rule("EmbeddingBackward0")
def embedding(op: Operation) -> Formula:
    """Rows of a table; like its gradient, the curvature of the row ``padding_idx`` is zero."""
    _refuse_what_is_no_gradient(op)
    node = op.node
    rows, count, padding = node._saved_indices, node._saved_weight_sym_argsize_0, signed(node._saved_padding_idx)
    return lambda h: (_embedding_dense_backward(h, rows, count, padding, False),)


_SUM, _MEAN, _MAX = 0, 1, 2


@register_rule("EmbeddingBagBackward0")
def embedding_bag(op: Operation) -> Formula:
    """Sums ``y_b = sum_k s_k w_k`` (s may be one), means or maxima of rows of a table, bag by bag."""
    _refuse_what_is_no_gradient(op)
    node = op.node
    rows, offsets, bags, sizes, chosen = (
        node._saved_indices, node._saved_offsets, node._saved_result1, node._saved_result2, node._saved_result3,
    )  # fmt: skip
    mode, scales, count = node._saved_mode, node._saved_per_sample_weights, node._saved_weight_sym_argsize_0
    padding = signed(node._saved_padding_idx)
    need_table, need_scales = op.needs
    table: Any = node._saved_weight if need_scales else None
    weights = None
    if need_table and mode != _MAX:
        s = torch.ones_like(rows, dtype=carried(op.input_meta(0)[0])) if scales is None else full(scales)
        if mode == _MEAN:
            s = s / sizes[bags]
        weights, mode = _squared_coefficients(rows, bags, count, s), _SUM

    def formula(h: Tensor) -> Diagonals:
        h_table = h_scales = None
        if need_scales:
            h_scales = _embedding_bag_per_sample_weights_backward(h, squared(table), rows, offsets, bags, _SUM, padding)
        if need_table:
            h_table = _embedding_bag_backward(
                h, rows, offsets, bags, sizes, chosen, count, False, mode, False, weights, padding
            )
        return h_table, h_scales

    return formula


def _squared_coefficients(rows: Tensor, bags: Tensor, count: int, s: Tensor) -> Tensor:
    """Weights that add up to ``(sum s)^2`` over the uses of one row in one bag, which squares alone would not."""
    pairs, pair, uses = (bags * count + rows).unique(return_inverse=True, return_counts=True)
    coefficients = s.new_zeros(pairs.shape).index_add_(0, pair, s)
    weights: Tensor = (coefficients.square() / uses)[pair]
    return weights
