"""Matrix products against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check, with_constants

CASES = [
    Case("mm", torch.mm, [(3, 4), (4, 2)], ["MmBackward0"]),
    Case("mm transposed weight", lambda x, w: x @ w.t(), [(3, 4), (2, 4)], ["MmBackward0", "TBackward0"]),
    Case("addmm", torch.addmm, [(2,), (3, 4), (4, 2)], ["AddmmBackward0"]),
    Case("addmm matrix", torch.addmm, [(3, 2), (3, 4), (4, 2)], ["AddmmBackward0"]),
    Case(
        "addmm scalars",
        lambda c, a, b: torch.addmm(c, a, b, alpha=0.5, beta=3.0),
        [(3, 1), (3, 4), (4, 2)],
        ["AddmmBackward0"],
    ),
    Case("linear", F.linear, [(3, 4), (2, 4), (2,)], ["AddmmBackward0", "TBackward0"]),
    Case("linear without bias", F.linear, [(3, 4), (2, 4)], ["MmBackward0", "TBackward0"]),
    Case("linear on one vector", F.linear, [(4,), (2, 4), (2,)]),
    Case("linear on sequences", F.linear, [(2, 3, 4), (2, 4), (2,)], ["AddmmBackward0"]),
    Case("matmul of sequences", torch.matmul, [(2, 3, 4), (4, 2)], ["MmBackward0"]),
    Case("bmm", torch.bmm, [(2, 3, 4), (2, 4, 2)], ["BmmBackward0"]),
    Case("broadcast matmul", torch.matmul, [(2, 1, 3, 4), (3, 4, 2)], ["BmmBackward0"]),
    Case("baddbmm", torch.baddbmm, [(2, 3, 2), (2, 3, 4), (2, 4, 2)], ["BaddbmmBackward0"]),
    Case(
        "baddbmm scalars",
        lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5, beta=3.0),
        [(1, 3, 1), (2, 3, 4), (2, 4, 2)],
        ["BaddbmmBackward0"],
    ),
    Case(
        "addbmm",
        lambda c, a, b: torch.addbmm(c, a, b, alpha=0.5, beta=3.0),
        [(3, 1), (2, 3, 4), (2, 4, 2)],
        ["AddbmmBackward0"],
    ),
    Case("mv", torch.mv, [(3, 4), (4,)], ["MvBackward0"]),
    Case("addmv", lambda c, a, x: torch.addmv(c, a, x, alpha=0.5, beta=3.0), [(1,), (3, 4), (4,)], ["AddmvBackward0"]),
    Case("addr", lambda c, a, b: torch.addr(c, a, b, alpha=0.5, beta=3.0), [(3, 1), (3,), (4,)], ["AddrBackward0"]),
    Case("dot", torch.dot, [(4,), (4,)], ["DotBackward0"]),
    Case("einsum", lambda a, b: torch.einsum("bij,kj->bik", a, b), [(2, 3, 4), (5, 4)], ["BmmBackward0"]),
    Case("tensordot", lambda a, b: torch.tensordot(a, b, 2), [(2, 3, 4), (3, 4, 2)], ["MmBackward0"]),
    Case("vdot", torch.vdot, [(4,), (4,)], ["VdotBackward0"]),
    Case("bilinear", F.bilinear, [(3, 4), (3, 2), (5, 4, 2), (5,)], ["TrilinearBackward0"]),
    Case("bilinear without bias", F.bilinear, [(2, 3, 4), (2, 3, 2), (5, 4, 2)], ["TrilinearBackward0"]),
    Case("addmm of a scalar", torch.addmm, [(), (3, 4), (4, 2)], ["AddmmBackward0"]),
]

ENDS = torch.tensor([1, 4], dtype=torch.int32)


def grouped(a: Tensor, b: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ENDS if a.dim() == 2 or b.dim() == 2 else None)


def grouped_by_hand(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == b.dim() == 3:
        return a @ b
    if a.dim() == 2 and b.dim() == 3:
        return torch.cat([a[:1] @ b[0], a[1:4] @ b[1]])
    if a.dim() == 2:
        return torch.stack([a[:, :1] @ b[:1], a[:, 1:4] @ b[1:4]])
    return torch.cat([a[0] @ b[:, :1], a[1] @ b[:, 1:4]], -1)


#: Torch has these products in float32 and half precision only, and rows of 16 bytes.
GROUPED = [
    Case("groups of rows", grouped, [(4, 8), (2, 8, 4)], ["GroupedMmBackward0"], reference=grouped_by_hand),
    Case("groups of columns", grouped, [(2, 4, 8), (8, 4)], ["GroupedMmBackward0"], reference=grouped_by_hand),
    Case("groups of the inner dimension", grouped, [(8, 4), (4, 8)], ["GroupedMmBackward0"], reference=grouped_by_hand),
    Case("batch", grouped, [(2, 4, 8), (2, 8, 4)], ["GroupedMmBackward0"], reference=grouped_by_hand),
]


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_grouped_products_equal_dense_derivatives(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)
