"""Inverses, linear systems and determinants: exact for each entry of the matrix, at the cost of an inverse.

With ``Y = A^-1``, ``dY_ab/dA_ij = -Y_ai Y_jb`` and ``d2Y_ab/dA_ij^2 = 2 Y_ai Y_ji Y_jb``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


def _through_inverse(y: Tensor, x: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """``(Y^2)^T h (X^2)^T + 2 Y^T o (Y^T g X^T)``: curvature at A where ``X = A^-1 B`` has g and h."""
    total = None
    if h is not None:
        total = y.square().mT @ h @ x.square().mT
    if g is not None:
        made = 2 * y.mT * (y.mT @ g @ x.mT)
        total = made if total is None else total + made
    return total


@register_rule("LinalgInvExBackward0", curved=True)
def inverse(op: Operation) -> Formula:
    """``(Y^2)^T h (Y^2)^T + 2 Y^T o (Y^T g Y^T)``."""
    y = op.node._saved_inverse
    return lambda g, h: (_through_inverse(y, y, g, h),)


@register_rule("LinalgSolveExBackward0", "LinalgSolveTriangularBackward0", curved=True)
def solve(op: Operation) -> Formula:
    """``h_B = (Y^2)^T h`` and ``h_A = (Y^2)^T h (X^2)^T + 2 Y^T o (Y^T g X^T)``, in a triangular A's triangle."""
    node = op.node
    triangular = node.name() == "LinalgSolveTriangularBackward0"
    a, x, left = node._saved_self if triangular else node._saved_A, node._saved_result, node._saved_left
    lower_of_left = triangular and node._saved_upper is not left
    unit = triangular and node._saved_unitriangular
    shape_a, shape_b = (op.input_shape(i) if need else None for i, need in enumerate(op.needs))
    vector = not triangular and x.dim() == a.dim() - 1

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        matrix, solution = a, x
        if vector:
            solution, g, h = (None if t is None else t.unsqueeze(-1 if left else -2) for t in (solution, g, h))
        if not left:  # X A = B is A^T X^T = B^T
            matrix, solution, g, h = (None if t is None else t.mT for t in (matrix, solution, g, h))
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        if triangular:
            y = torch.linalg.solve_triangular(matrix, identity, upper=not lower_of_left, unitriangular=unit)
        else:
            y = torch.linalg.inv(matrix)
        h_a = h_b = None
        if shape_a is not None:
            h_a = _through_inverse(y, solution, g, h)
            if triangular and h_a is not None:
                h_a = h_a.tril(-1 if unit else 0) if lower_of_left else h_a.triu(1 if unit else 0)
        if shape_b is not None and h is not None:
            h_b = y.square().mT @ h
        if not left:
            h_a, h_b = (None if t is None else t.mT for t in (h_a, h_b))
        if vector and h_b is not None:
            h_b = h_b.squeeze(-1 if left else -2)
        return (
            None if h_a is None or shape_a is None else h_a.sum_to_size(shape_a),
            None if h_b is None or shape_b is None else h_b.sum_to_size(shape_b),
        )

    return formula


@register_rule("LinalgDetBackward0")
def det(op: Operation) -> Formula:
    """Linear in each entry: ``(det Y_ji)^2 h``."""
    a, result = op.node._saved_A, op.node._saved_result
    return lambda h: (torch.linalg.inv(a).mT.square() * (result.square() * h)[..., None, None],)


@register_rule("LinalgSlogdetBackward0", curved=True, multi_output=True)
def slogdet(op: Operation) -> Formula:
    """``Y_ji^2 (h - g)``; the sign is flat."""
    a = op.node._saved_A

    def formula(g: tuple[Tensor | None, ...] | None, h: tuple[Tensor | None, ...] | None) -> Diagonals:
        g_log, h_log = (None if t is None else t[1] for t in (g, h))
        weight = h_log if g_log is None else -g_log if h_log is None else h_log - g_log
        return (None if weight is None else torch.linalg.inv(a).mT.square() * weight[..., None, None],)

    return formula


@register_rule("LinalgCrossBackward0")
def cross(op: Operation) -> Formula:
    """``y_1 = a_2 b_3 - a_3 b_2`` and so on: each entry of a meets the two others of b."""
    node = op.node
    a, b, dim = node._saved_self, node._saved_other, node._saved_dim
    dim = dim - 2**64 if dim >= 2**63 else dim
    shapes = [op.input_shape(i) if need else None for i, need in enumerate(op.needs)]

    def formula(h: Tensor) -> Diagonals:
        results: list[Tensor | None] = []
        for other, shape in zip((b, a), shapes, strict=True):
            if shape is None:
                results.append(None)
                continue
            square = other.square()
            both = square.roll(1, dim) * h.roll(-1, dim) + square.roll(-1, dim) * h.roll(1, dim)
            results.append(both.sum_to_size(shape))
        return results

    return formula
