"""Inverses, linear systems and determinants: exact for each entry of the matrix, at the cost of an inverse.

With ``Y = A^-1``, ``dY_ab/dA_ij = -Y_ai Y_jb`` and ``d2Y_ab/dA_ij^2 = 2 Y_ai Y_ji Y_jb``.
"""

from __future__ import annotations

from typing import Any

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value


def _inverse(a: Value) -> Value:
    """The inverse of what the forward pass has inverted already: without a look at whether there is one."""
    return torch.linalg.inv_ex(a)[0]


def _through_inverse(y: Value, x: Value, g: Value, h: Value) -> Value:
    """``(Y^2)^T h (X^2)^T + 2 Y^T o (Y^T g X^T)``: curvature at A where ``X = A^-1 B`` has g and h."""
    passed = ZERO if h is ZERO else (y * y).mT @ h @ (x * x).mT
    return passed if g is ZERO else passed + 2 * y.mT * (y.mT @ g @ x.mT)


@register_rule("LinalgInvExBackward0")
def inverse(op: Operation, g: Value, h: Value) -> Value:
    """``(Y^2)^T h (Y^2)^T + 2 Y^T o (Y^T g Y^T)``."""
    y = op.output("inverse")
    return _through_inverse(y, y, g, h)


@register_rule("LinalgSolveExBackward0", "LinalgSolveTriangularBackward0")
def solve(op: Operation, g: Value, h: Value) -> Any:
    """``h_B = (Y^2)^T h`` and ``h_A = (Y^2)^T h (X^2)^T + 2 Y^T o (Y^T g X^T)``, in a triangular A's triangle."""
    triangular = op.name == "LinalgSolveTriangularBackward0"
    a, x, left = op.input(0, "self" if triangular else "A"), op.output("result"), op.number("left")
    lower_of_left = triangular and op.number("upper") is not left
    unit = triangular and op.number("unitriangular")
    vector = not triangular and x.dim() == a.dim() - 1
    if vector:
        x, g, h = (t.unsqueeze(-1 if left else -2) for t in (x, g, h))
    if not left:  # X A = B is A^T X^T = B^T
        a, x, g, h = (t.mT for t in (a, x, g, h))
    if triangular:
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        y = torch.linalg.solve_triangular(a, identity, upper=not lower_of_left, unitriangular=unit)
    else:
        y = _inverse(a)
    h_a = _through_inverse(y, x, g, h) if op.need(0) else ZERO
    if triangular:
        h_a = h_a.tril(-1 if unit else 0) if lower_of_left else h_a.triu(1 if unit else 0)
    h_b = ZERO if h is ZERO or not op.need(1) else (y * y).mT @ h
    if not left:
        h_a, h_b = h_a.mT, h_b.mT
    if vector:
        h_b = h_b.squeeze(-1 if left else -2)
    return (
        h_a.sum_to_size(op.input_shape(0)) if op.need(0) else None,
        h_b.sum_to_size(op.input_shape(1)) if op.need(1) else None,
    )


@register_rule("LinalgDetBackward0")
def det(op: Operation, h: Value) -> Value:
    """Linear in each entry: ``(det Y_ji)^2 h``, the squared cofactors."""
    a = op.input(0, "A")
    # As in torch's gradient, a singular matrix is moved by rounding: its cofactors need not be zero.
    factored = torch.linalg.lu_factor_ex(a)
    pivots = factored[0].diagonal(0, -2, -1)
    moved = factored[0] + torch.diag_embed((pivots == 0) * torch.finfo(a.dtype).eps)
    y = torch.linalg.lu_solve(moved, factored[1], torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)).mT
    cofactors = y * moved.diagonal(0, -2, -1).prod(-1)[..., None, None]  # but for their sign
    return cofactors * cofactors * h[..., None, None]


@register_rule("LinalgSlogdetBackward0", multi_output=True)
def slogdet(op: Operation, g: Any, h: Any) -> Value:
    """``Y_ji^2 (h - g)``; the sign is flat."""
    weight = h[1] - g[1] if g[1] is not ZERO else h[1]
    if weight is ZERO:
        return ZERO
    y = _inverse(op.input(0, "A")).mT
    return y * y * weight[..., None, None]


@register_rule("LinalgCrossBackward0")
def cross(op: Operation, h: Value) -> Any:
    """``y_1 = a_2 b_3 - a_3 b_2`` and so on: each entry of a meets the two others of b."""
    a, b, dim = op.input(0, "self"), op.input(1, "other"), op.number("dim")

    def of(other: Value, i: int) -> Value:
        square = other * other
        both = square.roll(1, dim) * h.roll(-1, dim) + square.roll(-1, dim) * h.roll(1, dim)
        return both.sum_to_size(op.input_shape(i))

    return of(b, 0) if op.need(0) else None, of(a, 1) if op.need(1) else None
