"""Rows of a table, one by one or reduced in bags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

_aten = torch.ops.aten
_embedding_dense_backward = _aten.embedding_dense_backward.default
_embedding_bag_backward = _aten._embedding_bag_backward.default
_embedding_bag_per_sample_weights_backward = _aten._embedding_bag_per_sample_weights_backward.default


def _gradient_is_that_of_the_loss(op: Operation) -> None:
    if op.number("sparse"):
        raise op.unsupported("the diagonal of a sparse gradient is not supported; use sparse=False")
    if op.number("scale_grad_by_freq"):
        raise op.unsupported(
            "scale_grad_by_freq=True scales the gradient, which is then no longer that of the loss; use False"
        )


@register_rule("EmbeddingBackward0", check=_gradient_is_that_of_the_loss)
def embedding(op: Operation, h: Value) -> Value:
    """Rows of a table; like its gradient, the curvature of the row ``padding_idx`` is zero."""
    count, padding = op.number("weight_sym_argsize_0"), op.number("padding_idx")
    return _embedding_dense_backward(h, op.tensor("indices"), count, padding, False)


_SUM, _MEAN, _MAX = 0, 1, 2


@register_rule("EmbeddingBagBackward0", check=_gradient_is_that_of_the_loss)
def embedding_bag(op: Operation, h: Value) -> Sequence[Value]:
    """Sums ``y_b = sum_k s_k w_k`` (s may be one), means or maxima of rows of a table, bag by bag."""
    rows, offsets, bags = op.tensor("indices"), op.tensor("offsets"), op.tensor("result1")
    sizes, chosen = op.tensor("result2"), op.tensor("result3")
    mode, count, padding = op.number("mode"), op.number("weight_sym_argsize_0"), op.number("padding_idx")
    h_table = h_scales = None
    if op.need(0):
        weights = None
        if mode != _MAX:
            s = op.tensor("per_sample_weights")
            s = torch.ones_like(rows, dtype=op.input_dtype(0)) if s is None else s
            s = s / sizes.index_select(0, bags) if mode == _MEAN else s
            weights, mode = _squared_coefficients(rows, bags, count, s), _SUM
        h_table = _embedding_bag_backward(
            h, rows, offsets, bags, sizes, chosen, count, False, mode, False, weights, padding
        )
    if op.need(1):
        w = op.input(0, "weight")
        h_scales = _embedding_bag_per_sample_weights_backward(h, w * w, rows, offsets, bags, _SUM, padding)
    return h_table, h_scales


@opaque
def _squared_coefficients(rows: Tensor, bags: Tensor, count: int, s: Tensor) -> Tensor:
    """Weights that add up to ``(sum s)^2`` over the uses of one row in one bag, which squares alone would not."""
    pairs, pair, uses = (bags * count + rows).unique(return_inverse=True, return_counts=True)
    coefficients = s.new_zeros(pairs.shape).index_add_(0, pair, s)
    weights: Tensor = (coefficients.square() / uses)[pair]
    return weights
