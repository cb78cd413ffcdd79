"""Matrix products: bilinear, so the squared Jacobian is the same product with the other operand squared.

For ``Y = A B`` that is ``h_A = h (B^2)^T`` and ``h_B = (A^2)^T h``, with squares taken entry by entry; there is no
second derivative in one operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, register_rule
from hesscale_lightning.curvature.values import Value


def squared(x: Value) -> Value:
    """``x * x``."""
    return x * x


@register_rule("MmBackward0", bilinear=True)
def mm(op: Operation, h: Value) -> Sequence[Value]:
    """``Y = A B``."""
    a, b = op.input(0, "self"), op.input(1, "mat2")  # None where the other operand needs no gradient
    return (
        h @ squared(b).t() if op.need(0) else None,
        squared(a).t() @ h if op.need(1) else None,
    )


@register_rule("AddmmBackward0", bilinear=True)
def addmm(op: Operation, h: Value) -> Sequence[Value]:
    """``Y = beta C + alpha A B``."""
    a, b = op.input(1, "mat1"), op.input(2, "mat2")
    scaled = h * op.number("alpha") ** 2
    return (
        h.sum_to_size(op.input_shape(0)) * op.number("beta") ** 2 if op.need(0) else None,
        scaled @ squared(b).t() if op.need(1) else None,
        squared(a).t() @ scaled if op.need(2) else None,
    )


@register_rule("BmmBackward0", bilinear=True)
def bmm(op: Operation, h: Value) -> Sequence[Value]:
    """``Y_k = A_k B_k``."""
    a, b = op.input(0, "self"), op.input(1, "mat2")
    return (
        h @ squared(b).mT if op.need(0) else None,
        squared(a).mT @ h if op.need(1) else None,
    )


def _added_product(
    op: Operation,
    left: str,
    right: str,
    at_left: Callable[[Tensor, Tensor], Tensor],
    at_right: Callable[[Tensor, Tensor], Tensor],
) -> Formula:
    """``Y = beta C + alpha f(A, B)`` with a bilinear ``f``.

    Args:
        op: The operation.
        left: What the node calls A.
        right: What the node calls B.
        at_left: From h and ``B^2`` the curvature at A.
        at_right: From ``A^2`` and h the curvature at B.
    """
    a, b = getattr(op.node, f"_saved_{left}"), getattr(op.node, f"_saved_{right}")
    alpha, beta = op.node._saved_alpha, op.node._saved_beta
    need_c, need_a, need_b = op.needs
    shape = op.input_shape(0) if need_c else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        scaled = h * alpha**2
        return (
            h.sum_to_size(shape) * beta**2 if need_c else None,
            at_left(scaled, squared(b)) if need_a else None,
            at_right(squared(a), scaled) if need_b else None,
        )

    return formula


@register_rule("BaddbmmBackward0", bilinear=True)
def baddbmm(op: Operation) -> Formula:
    """``Y = beta C + alpha A B``."""
    return _added_product(op, "batch1", "batch2", lambda h, b: h.bmm(b.mT), lambda a, h: a.mT.bmm(h))


@register_rule("AddbmmBackward0", bilinear=True)
def addbmm(op: Operation) -> Formula:
    """``Y = beta C + alpha sum_k A_k B_k``."""
    return _added_product(op, "batch1", "batch2", lambda h, b: h.matmul(b.mT), lambda a, h: a.mT.matmul(h))


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
    return _added_product(op, "mat", "vec", torch.outer, lambda a, h: a.t().mv(h))


@register_rule("AddrBackward0", bilinear=True)
def addr(op: Operation) -> Formula:
    """``Y = beta C + alpha a b^T``."""
    return _added_product(op, "vec1", "vec2", lambda h, b: h.mv(b), lambda a, h: h.t().mv(a))


@register_rule("DotBackward0", "VdotBackward0", bilinear=True)
def dot(op: Operation) -> Formula:
    node = op.node
    a, b = node._saved_self, node._saved_tensor if node.name() == "DotBackward0" else node._saved_other
    need_a, need_b = op.needs
    return lambda h: (squared(b) * h if need_a else None, squared(a) * h if need_b else None)


@register_rule("GroupedMmBackward0")
def grouped_mm(op: Operation) -> Formula:
    """A matrix product for each group; the groups are blocks of rows, of columns or of the inner dimension."""
    node = op.node
    a, b, ends = node._saved_self, node._saved_mat2, node._saved_offs  # ends: where each block ends
    need_a, need_b = op.needs[:2]
    rank_a, rank_b = len(node._saved_self_sym_sizes), len(node._saved_mat2_sym_sizes)
    shape_a, shape_b = node._saved_self_sym_sizes, node._saved_mat2_sym_sizes
    rest = (None,) * (len(op.needs) - 2)

    def formula(h: Tensor) -> Diagonals:
        if ends is None:
            return (h @ squared(b).mT if need_a else None, squared(a).mT @ h if need_b else None, *rest)
        h_a = h.new_zeros(shape_a) if need_a else None
        h_b = h.new_zeros(shape_b) if need_b else None
        start = 0
        for group, end in enumerate(ends.tolist()):
            block = slice(start, end)
            of_a = (block,) if rank_a == 2 and rank_b == 3 else (slice(None), block) if rank_a == 2 else (group,)
            of_b = (group,) if rank_b == 3 else (block,) if rank_a == 2 else (slice(None), block)
            of_h = (block,) if rank_a == 2 and rank_b == 3 else (group,) if rank_a == 2 else (slice(None), block)
            if h_a is not None:
                h_a[of_a] = h[of_h] @ squared(b[of_b]).mT
            if h_b is not None:
                h_b[of_b] = squared(a[of_a]).mT @ h[of_h]
            start = end
        return (h_a, h_b, *rest)

    return formula


@register_rule("TrilinearBackward0")
def bilinear(op: Operation) -> Formula:
    """``y_o = sum_ij x_i w_oij z_j``: ``h_x = sum_o (sum_j w_oij z_j)^2 h_o``, ``h_w = x_i^2 z_j^2 h_o``."""
    node = op.node
    x, w, z = node._saved_i1, node._saved_i2, node._saved_i3
    layout = [tuple(d) for d in (node._saved_expand1, node._saved_expand2, node._saved_expand3, node._saved_sumdim)]
    if layout != [(1, 3), (0,), (1, 2), (2, 3)]:
        raise op.unsupported("of products of three tensors only those of a bilinear layer are known")
    need_x, need_w, need_z = op.needs

    def formula(h: Tensor) -> Diagonals:
        h_x = h_w = h_z = None
        if need_x:
            h_x = torch.einsum("boi,bo->bi", squared(torch.einsum("oij,bj->boi", full(w), full(z))), h)
        if need_z:
            h_z = torch.einsum("boj,bo->bj", squared(torch.einsum("oij,bi->boj", full(w), full(x))), h)
        if need_w:
            h_w = torch.einsum("bo,bi,bj->oij", h, squared(x), squared(z))
        return h_x, h_w, h_z

    return formula
