"""Matrix products: bilinear, so the squared Jacobian is the same product with the other operand squared.

For ``Y = A B`` that is ``h_A = h (B^2)^T`` and ``h_B = (A^2)^T h``, with squares taken entry by entry; there is no
second derivative in one operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

Product = Callable[[Value, Value], Value]


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


def _outer(x: Value, y: Value) -> Value:
    return x.unsqueeze(-1) * y


#: Y = f(A, B), or Y = beta C + alpha f(A, B): the node, what it calls A and B, the formula, then
#: h_A from h and B^2, and h_B from A^2 and h.
_PRODUCTS: tuple[tuple[str, str, str, str, Product, Product], ...] = (
    ("BaddbmmBackward0", "batch1", "batch2", "Y = beta C + alpha A B", lambda h, b: h @ b.mT, lambda a, h: a.mT @ h),
    ("AddbmmBackward0", "batch1", "batch2", "Y = beta C + alpha sum A B", lambda h, b: h @ b.mT, lambda a, h: a.mT @ h),
    ("MvBackward0", "self", "vec", "y = A x", _outer, lambda a, h: a.t() @ h),
    ("AddmvBackward0", "mat", "vec", "y = beta c + alpha A x", _outer, lambda a, h: a.t() @ h),
    ("AddrBackward0", "vec1", "vec2", "Y = beta C + alpha a b^T", lambda h, b: h @ b, lambda a, h: h.t() @ a),
    ("DotBackward0", "self", "tensor", "y = a^T b", lambda h, b: h * b, lambda a, h: a * h),
    ("VdotBackward0", "self", "other", "y = a^T b", lambda h, b: h * b, lambda a, h: a * h),
)  # fmt: skip


def _register_product(node: str, left: str, right: str, text: str, at_left: Product, at_right: Product) -> None:
    added = text.startswith(("Y = beta", "y = beta"))
    i = int(added)  # which input is A

    def rule(op: Operation, h: Value) -> Sequence[Value]:
        a, b = op.input(i, left), op.input(i + 1, right)
        scaled = h * op.number("alpha") ** 2 if added else h
        products = (
            at_left(scaled, squared(b)) if op.need(i) else None,
            at_right(squared(a), scaled) if op.need(i + 1) else None,
        )
        if not added:
            return products
        return h.sum_to_size(op.input_shape(0)) * op.number("beta") ** 2 if op.need(0) else None, *products

    rule.__doc__ = f"``{text}``."
    register_rule(node, bilinear=True)(rule)


for _product in _PRODUCTS:
    _register_product(*_product)


@register_rule("GroupedMmBackward0")
def grouped_mm(op: Operation, h: Value) -> Sequence[Value]:
    """A matrix product for each group; the groups are blocks of rows, of columns or of the inner dimension."""
    a, b, ends = op.tensor("self"), op.tensor("mat2"), op.tensor("offs")  # ends: where each block ends
    shapes = [op.number(f"{name}_sym_sizes") if op.need(i) else None for i, name in enumerate(("self", "mat2"))]
    rest = (None,) * (len(op.needs) - 2)
    if ends is None:
        return h @ squared(b).mT if op.need(0) else None, squared(a).mT @ h if op.need(1) else None, *rest
    ranks = len(op.number("self_sym_sizes")), len(op.number("mat2_sym_sizes"))
    return *_by_groups(h, a, b, ends, ranks, *shapes), *rest


@opaque
def _by_groups(
    h: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    ends: Tensor,
    ranks: tuple[int, int],
    shape_a: tuple[int, ...] | None,
    shape_b: tuple[int, ...] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The curvatures of A and B where their shapes are given. The ends of the blocks are read from their device."""
    h_a = None if shape_a is None else h.new_zeros(shape_a)
    h_b = None if shape_b is None else h.new_zeros(shape_b)
    places: Any
    start = 0
    for group, end in enumerate(ends.tolist()):
        block, all_rows = slice(start, end), slice(None)
        places = {
            (2, 3): ((block,), (group,), (block,)),
            (3, 2): ((group,), (all_rows, block), (all_rows, block)),
            (2, 2): ((all_rows, block), (block,), (group,)),
        }[ranks]
        of_a, of_b, of_h = places
        if h_a is not None and b is not None:
            h_a[of_a] = h[of_h] @ squared(b[of_b]).mT
        if h_b is not None and a is not None:
            h_b[of_b] = squared(a[of_a]).mT @ h[of_h]
        start = end
    return h_a, h_b


def _is_bilinear(op: Operation) -> None:
    layout = tuple(op.number(name) for name in ("expand1", "expand2", "expand3", "sumdim"))
    if layout != ((1, 3), (0,), (1, 2), (2, 3)):
        raise op.unsupported("of products of three tensors only those of a bilinear layer are known")


@register_rule("TrilinearBackward0", check=_is_bilinear)
def bilinear(op: Operation, h: Value) -> Sequence[Value]:
    """``y_o = sum_ij x_i w_oij z_j``: ``h_x = sum_o (sum_j w_oij z_j)^2 h_o``, ``h_w = x_i^2 z_j^2 h_o``."""
    x, w, z = op.input(0, "i1"), op.input(1, "i2"), op.input(2, "i3")
    return (
        torch.einsum("boi,bo->bi", squared(torch.einsum("oij,bj->boi", w, z)), h) if op.need(0) else None,
        torch.einsum("bo,bi,bj->oij", h, squared(x), squared(z)) if op.need(1) else None,
        torch.einsum("boj,bo->bj", squared(torch.einsum("oij,bi->boj", w, x)), h) if op.need(2) else None,
    )
