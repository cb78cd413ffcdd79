"""Matrix products: bilinear, so the squared Jacobian is the same product with the other operand squared.

For ``Y = A B`` that is ``h_A = h (B^2)^T`` and ``h_B = (A^2)^T h``, with squares taken entry by entry; there is no
second derivative in one operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


def _right_operand(a: Tensor, h: Tensor, transposed: bool) -> Tensor:
    """``(A^2)^T h``, or its transpose: made the way round that leaves a weight's curvature laid out like the weight."""
    return h.t().mm(squared(a)) if transposed else squared(a).t().mm(h)


@register_rule("MmBackward0", bilinear=True)
def mm(op: Operation) -> Formula:
    a, b = op.node._saved_self, op.node._saved_mat2  # None where the other operand needs no gradient
    need_a, need_b = op.needs
    transposed = op.transposed[1]
    op.transposed[1] = False

    def formula(h: Tensor) -> Diagonals:
        return (
            h.mm(squared(b).t()) if need_a else None,
            _right_operand(a, h, transposed) if need_b else None,
        )

    return formula


@register_rule("AddmmBackward0", bilinear=True)
def addmm(op: Operation) -> Formula:
    """``Y = beta C + alpha A B``."""
    a, b = op.node._saved_mat1, op.node._saved_mat2
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_b = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()
    transposed = op.transposed[2]
    op.transposed[2] = False

    def formula(h: Tensor) -> Diagonals:
        h_c = h_a = h_b = None
        if need_c:
            h_c = h.sum(0) if len(shape) == 1 and shape[0] == h.shape[1] else h.sum_to_size(shape)
            if beta != 1:
                h_c = h_c * beta**2
        if alpha != 1:
            h = h * alpha**2
        if need_a:
            h_a = h.mm(squared(b).t())
        if need_b:
            h_b = _right_operand(a, h, transposed)
        return h_c, h_a, h_b

    return formula


@register_rule("BmmBackward0", bilinear=True)
def bmm(op: Operation) -> Formula:
    a, b = op.node._saved_self, op.node._saved_mat2
    need_a, need_b = op.needs
    return lambda h: (
        h.bmm(squared(b).mT) if need_a else None,
        squared(a).mT.bmm(h) if need_b else None,
    )


@register_rule("BaddbmmBackward0", bilinear=True)
def baddbmm(op: Operation) -> Formula:
    """``Y = beta C + alpha A B``."""
    a, b = op.node._saved_batch1, op.node._saved_batch2
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_b = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        scaled = h * alpha**2
        return (
            h.sum_to_size(shape) * beta**2 if need_c else None,
            scaled.bmm(squared(b).mT) if need_a else None,
            squared(a).mT.bmm(scaled) if need_b else None,
        )

    return formula


@register_rule("AddbmmBackward0", bilinear=True)
def addbmm(op: Operation) -> Formula:
    """``Y = beta C + alpha sum_k A_k B_k``."""
    a, b = op.node._saved_batch1, op.node._saved_batch2
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_b = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        scaled = (h * alpha**2).unsqueeze(0)
        return (
            h.sum_to_size(shape) * beta**2 if need_c else None,
            scaled.matmul(squared(b).mT) if need_a else None,
            squared(a).mT.matmul(scaled) if need_b else None,
        )

    return formula


@register_rule("MvBackward0", bilinear=True)
def mv(op: Operation) -> Formula:
    a, x = op.node._saved_self, op.node._saved_vec
    need_a, need_x = op.needs
    return lambda h: (
        torch.outer(h, squared(x)) if need_a else None,
        squared(a).t().mv(h) if need_x else None,
    )


@register_rule("AddmvBackward0", bilinear=True)
def addmv(op: Operation) -> Formula:
    """``y = beta c + alpha A x``."""
    a, x = op.node._saved_mat, op.node._saved_vec
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_x = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        scaled = h * alpha**2
        return (
            h.sum_to_size(shape) * beta**2 if need_c else None,
            torch.outer(scaled, squared(x)) if need_a else None,
            squared(a).t().mv(scaled) if need_x else None,
        )

    return formula


@register_rule("AddrBackward0", bilinear=True)
def addr(op: Operation) -> Formula:
    """``Y = beta C + alpha a b^T``."""
    a, b = op.node._saved_vec1, op.node._saved_vec2
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_b = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        scaled = h * alpha**2
        return (
            h.sum_to_size(shape) * beta**2 if need_c else None,
            scaled.mv(squared(b)) if need_a else None,
            scaled.t().mv(squared(a)) if need_b else None,
        )

    return formula


@register_rule("DotBackward0", bilinear=True)
def dot(op: Operation) -> Formula:
    a, b = op.node._saved_self, op.node._saved_tensor
    need_a, need_b = op.needs
    return lambda h: (squared(b) * h if need_a else None, squared(a) * h if need_b else None)
