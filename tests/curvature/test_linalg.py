"""Inverses, linear systems and determinants against dense derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.curvature.oracle import Case, check, with_constants

linalg = torch.linalg
triangular = linalg.solve_triangular
REGULAR = torch.randn((2, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2 * torch.eye(3)
A = REGULAR[0]
SINGULAR = torch.stack([A[0], A[1], A[0] - A[1]])


def by_cofactors(a: Tensor) -> Tensor:
    """Of operations that are smooth where there is no inverse, too."""
    return a[0].dot(linalg.cross(a[1], a[2]))


CASES = [
    Case("inverse", linalg.inv, [REGULAR], ["LinalgInvExBackward0"]),
    Case("solve", linalg.solve, [REGULAR, (2, 3, 4)], ["LinalgSolveExBackward0"]),
    Case("solve for a vector", linalg.solve, [A, (3,)], ["LinalgSolveExBackward0"]),
    Case("solve from the right", lambda a, b: linalg.solve(a, b, left=False), [A, (2, 3)], ["LinalgSolveExBackward0"]),
    Case("solve for a batch", linalg.solve, [A, (2, 3, 2)], ["LinalgSolveExBackward0"]),
    Case("lower triangle", lambda a, b: triangular(a, b, upper=False), [A, (3, 2)], ["LinalgSolveTriangularBackward0"]),
    Case("upper triangle", lambda a, b: triangular(a, b, upper=True), [A, (3, 2)], ["LinalgSolveTriangularBackward0"]),
    Case(
        "unit triangle from the right",
        lambda a, b: triangular(a, b, upper=True, left=False, unitriangular=True),
        [A, (2, 3)],
        ["LinalgSolveTriangularBackward0"],
    ),
    Case(
        "triangle for a batch",
        lambda a, b: triangular(a, b, upper=False),
        [REGULAR, (3, 2)],
        ["LinalgSolveTriangularBackward0"],
    ),
    Case("det", linalg.det, [REGULAR], ["LinalgDetBackward0"]),
    Case("det of a singular matrix", linalg.det, [SINGULAR], ["LinalgDetBackward0"], reference=by_cofactors),
    Case("slogdet", lambda a: linalg.slogdet(a)[1], [REGULAR], ["LinalgSlogdetBackward0"]),
    Case("cross", linalg.cross, [(2, 3), (2, 3)], ["LinalgCrossBackward0"]),
    Case("cross along the first", lambda a, b: linalg.cross(a, b, dim=0), [(3, 2), (3, 1)], ["LinalgCrossBackward0"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)
