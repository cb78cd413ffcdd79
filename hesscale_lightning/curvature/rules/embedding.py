"""Rows of a table, one by one or reduced in bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import carried, signed

_aten = torch.ops.aten
_embedding_dense_backward = _aten.embedding_dense_backward.default
_embedding_bag_backward = _aten._embedding_bag_backward.default
_embedding_bag_per_sample_weights_backward = _aten._embedding_bag_per_sample_weights_backward.default


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
