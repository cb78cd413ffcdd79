"""Norms, distances and variances against dense derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import backward
from hesscale_lightning.curvature.rules import distance
from tests.curvature.oracle import Case, check, with_constants

norm = torch.linalg.vector_norm
aten = torch.ops.aten
WITH_ZERO = torch.tensor([[1.0, 0.0, -2.0], [0.3, 0.4, 0.0]], dtype=torch.float64)
TIED = torch.tensor([[1.0, -2.0, 2.0], [3.0, 1.0, -1.0]], dtype=torch.float64)


def all_pairs(a: Tensor, b: Tensor, p: float = 2.0) -> Tensor:
    """Of operations that torch differentiates twice, unlike its own."""
    return norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def upper_pairs(a: Tensor, p: float) -> Tensor:
    i, j = torch.triu_indices(len(a), len(a), 1)
    return norm(a[i] - a[j], p, -1)


CASES = [
    *[
        Case(f"norm of order {p}", lambda x, p=p: norm(x, p), [(3, 4)], ["LinalgVectorNormBackward0"])
        for p in (0, 0.5, 1, 1.5, 2, 2.5, 3, 4, math.inf, -math.inf, -1)
    ],
    *[
        Case(f"norm of order {p} of rows", lambda x, p=p: norm(x, p, -1), [(3, 4)], ["LinalgVectorNormBackward0"])
        for p in (1, 1.5, 2, 3, math.inf)
    ],
    Case(
        "norm of two dimensions",
        lambda x: norm(x, 2, (0, -1), keepdim=True),
        [(2, 3, 4)],
        ["LinalgVectorNormBackward0"],
    ),
    Case("norm with zeros", lambda x: norm(x, 2, -1), [WITH_ZERO], ["LinalgVectorNormBackward0"]),
    Case("norm of order 4 with zeros", lambda x: norm(x, 4, -1), [WITH_ZERO], ["LinalgVectorNormBackward0"]),
    Case("norm of tied entries", lambda x: norm(x, math.inf, -1), [TIED], ["LinalgVectorNormBackward0"]),
    Case("norm of a number", norm, [()], ["LinalgVectorNormBackward0"]),
    Case("Frobenius norm", torch.linalg.matrix_norm, [(3, 4)], ["LinalgVectorNormBackward0"]),
    Case("old norm", lambda x: aten.norm.Scalar(x, 2), [(3, 4)], ["NormBackward0"]),
    Case("old norm of rows", lambda x: aten.norm.ScalarOpt_dim(x, 3, [1], True), [(3, 4)], ["NormBackward1"]),
    Case(
        "old norm in float64",
        lambda x: aten.norm.ScalarOpt_dtype(x, 2, dtype=torch.float64),
        [(3, 4)],
        ["NormBackward2"],
    ),
    Case(
        "old norm of rows in float64",
        lambda x: aten.norm.ScalarOpt_dim_dtype(x, 2, [1], False, dtype=torch.float64),
        [(3, 4)],
        ["NormBackward3"],
    ),
    Case("dist", torch.dist, [(3, 4), (4,)], ["DistBackward0"]),
    Case("dist of order 3", lambda a, b: torch.dist(a, b, 3), [(3, 4), (3, 4)], ["DistBackward0"]),
    Case("dist of order 1", lambda a, b: torch.dist(a, b, 1), [(3, 4), (3, 4)], ["DistBackward0"]),
    *[
        Case(
            f"cdist of order {p}",
            lambda a, b, p=p: torch.cdist(a, b, p),
            [(3, 4), (5, 4)],
            ["CdistBackward0"],
            reference=lambda a, b, p=p: all_pairs(a, b, p),
        )
        for p in (0.0, 1.0, 1.5, 2.0, 3.0, math.inf)
    ],
    Case("cdist of batches", torch.cdist, [(2, 3, 4), (5, 4)], ["CdistBackward0"], reference=all_pairs),
    Case("cdist by matrix products", torch.cdist, [(27, 2), (2, 2)], ["EuclideanDistBackward0"], reference=all_pairs),
    Case("pdist", F.pdist, [(5, 3)], ["PdistBackward0"], reference=lambda a: upper_pairs(a, 2)),
    Case(
        "pdist of order 3", lambda a: F.pdist(a, 3), [(4, 3)], ["PdistBackward0"], reference=lambda a: upper_pairs(a, 3)
    ),
    Case("var", torch.var, [(3, 4)], ["VarBackward0"]),
    Case("var of rows", lambda x: x.var(-1), [(3, 4)], ["VarBackward0"]),
    Case("var without correction", lambda x: x.var((0, 2), correction=0, keepdim=True), [(2, 3, 4)], ["VarBackward0"]),
    Case("std", torch.std, [(3, 4)], ["StdBackward0"]),
    Case("std of rows", lambda x: x.std(-1), [(3, 4)], ["StdBackward0"]),
    Case("std of columns", lambda x: x.std(0, correction=2), [(4, 3)], ["StdBackward0"]),
    Case("var_mean", lambda x: torch.var_mean(x, -1), [(3, 4)], ["VarMeanBackward0"]),
    Case("var_mean of all", torch.var_mean, [(3, 4)], ["VarMeanBackward0"]),
    Case("mean of var_mean", lambda x: torch.var_mean(x, -1)[1], [(3, 4)], ["VarMeanBackward0"]),
    Case("std_mean", lambda x: torch.std_mean(x, 0, keepdim=True), [(3, 4)], ["StdMeanBackward0"]),
    Case("std of std_mean", lambda x: torch.std_mean(x, 0)[0], [(3, 4)], ["StdMeanBackward0"]),
    *[
        Case(f"renorm of order {p}", lambda x, p=p: x.renorm(p, 0, 2.0), [(5, 3)], ["RenormBackward0"])
        for p in (1, 2, 3)
    ],
    Case("renorm of columns", lambda x: x.renorm(2, -1, 1.5), [(2, 3, 4)], ["RenormBackward0"]),
    Case("pairwise_distance", F.pairwise_distance, [(3, 4), (3, 4)], ["NormBackward1"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


def test_norm_of_zeros_is_flat_as_for_autograd() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    backward(norm(x, 2, -1).exp().sum())
    assert not x.grad.any()
    assert not x.hess_diag.any()


@pytest.mark.parametrize("name", ["cdist of order 3.0", "cdist of batches", "pdist"])
def test_blocks_of_rows_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_PAIRS", 1)
    check(next(case for case in CASES if case.name == name))


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", [lambda x: norm(x, 3, -1, dtype=torch.float64), lambda x: norm(x, dtype=torch.float64)])
def test_norm_in_another_dtype(of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, exact = torch.eye(4, dtype=dtype, requires_grad=True), torch.eye(4, dtype=torch.float64, requires_grad=True)
    backward(of(x @ one).exp().sum())
    backward(of(x.double() @ exact).exp().sum())
    assert one.hess_diag.dtype is torch.float32
    torch.testing.assert_close(one.hess_diag, exact.hess_diag.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("of", [lambda x: x.var(-1), lambda x: x.std(-1), lambda x: torch.var_mean(x, -1)[0]])
def test_what_has_no_variance_has_the_curvature_of_its_gradient(of: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 1, requires_grad=True)
    backward(of(x).exp().sum())
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert x.hess_diag.isnan().all()


@pytest.mark.parametrize("shapes", [((0, 3), (4, 3)), ((4, 3), (0, 3))], ids=str)
def test_distances_of_no_rows(shapes: Sequence[tuple[int, int]]) -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    backward(torch.cdist(*inputs).exp().sum())
    assert not any(x.hess_diag.any() for x in inputs)
