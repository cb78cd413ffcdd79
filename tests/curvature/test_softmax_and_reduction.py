"""Softmax, log-softmax and logsumexp against dense derivatives; Becker and LeCun's pointwise forms against theirs."""

from __future__ import annotations

import pytest
import torch

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, Probe, check

ZEROS = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
WITH_NAN = torch.tensor([[1.0, torch.nan, -2.0], [0.0, 3.0, 0.5]], dtype=torch.float64)
HIDDEN = torch.tensor([[False, True, False], [False, False, False]])

CASES = [
    Case("safe softmax", lambda x: torch._safe_softmax(x, -1), [(3, 4)], ["SafeSoftmaxBackward0"]),
    Case(
        "masked softmax",
        lambda x: torch._masked_softmax(x, HIDDEN, 1),
        [(2, 3)],
        ["MaskedSoftmaxBackward0"],
        reference=lambda x: x.masked_fill(HIDDEN, -torch.inf).softmax(1),
    ),
    Case("nansum", torch.nansum, [WITH_NAN], ["NansumBackward0"]),
    Case("nansum of rows", lambda x: x.nansum(-1), [WITH_NAN], ["NansumBackward0"]),
    Case("prod", torch.prod, [(3, 4)], ["ProdBackward0"]),
    Case("prod with a zero", torch.prod, [torch.tensor([1.0, 0.0, -2.0]).double()], ["ProdBackward0"]),
    Case("prod of a number", torch.prod, [()], ["ProdBackward0"]),
    Case("prod of rows", lambda x: x.prod(-1), [(2, 3, 4)], ["ProdBackward1"]),
    Case("prod of columns", lambda x: x.prod(0, keepdim=True), [(3, 4)], ["ProdBackward1"]),
    Case("prod of rows with zeros", lambda x: x.prod(1), [ZEROS], ["ProdBackward1"]),
    Case("cumprod", lambda x: x.cumprod(-1), [(3, 4)], ["CumprodBackward0"]),
    Case(
        "cumprod of columns",
        lambda x: x.cumprod(0),
        [(3, 4)],
        ["CumprodBackward0"],
        reference=lambda x: torch.stack([x[0], x[0] * x[1], x[0] * x[1] * x[2]]),
    ),
    Case(
        "cumprod with zeros",
        lambda x: x.cumprod(1),
        [ZEROS],
        ["CumprodBackward0"],
        reference=lambda x: torch.stack([x[:, :k].prod(1) for k in (1, 2, 3)], 1),
    ),
    Case("logcumsumexp", lambda x: x.logcumsumexp(-1), [(3, 4)], ["LogcumsumexpBackward0"]),
    Case("logcumsumexp of large numbers", lambda x: (x + 900).logcumsumexp(0), [(3, 4)], ["LogcumsumexpBackward0"]),
    Case("softmax", lambda x: x.softmax(-1), [(3, 4)], ["SoftmaxBackward0"]),
    Case("softmax of dimension 0", lambda x: x.softmax(0), [(3, 4)], ["SoftmaxBackward0"]),
    Case("softmax in the middle", lambda x: x.softmax(1), [(2, 3, 2)], ["SoftmaxBackward0"]),
    Case("log_softmax", lambda x: x.log_softmax(-1), [(3, 4)], ["LogSoftmaxBackward0"]),
    Case("log_softmax of dimension 1", lambda x: x.log_softmax(1), [(2, 3, 2)], ["LogSoftmaxBackward0"]),
    Case("logsumexp", lambda x: x.logsumexp(-1), [(3, 4)], ["LogsumexpBackward0"]),
    Case("logsumexp of two", lambda x: x.logsumexp((0, -1)), [(2, 3, 4)], ["LogsumexpBackward0"]),
    Case("logsumexp keepdim", lambda x: x.logsumexp(1, keepdim=True), [(3, 4)], ["LogsumexpBackward0"]),
    Case("sum", torch.sum, [(3, 4)], ["SumBackward0"]),
    Case("sum of dimension", lambda x: x.sum(1), [(3, 4)], ["SumBackward1"]),
    Case("sum keepdim", lambda x: x.sum((0, 2), keepdim=True), [(2, 3, 4)], ["SumBackward1"]),
    Case("mean", torch.mean, [(3, 4)], ["MeanBackward0"]),
    Case("mean of dimensions", lambda x: x.mean((0, 2)), [(2, 3, 4)], ["MeanBackward1"]),
    Case("cumsum", lambda x: x.cumsum(1), [(3, 4)], ["CumsumBackward0"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("with_h", [False, True])
def test_bl89_treats_softmax_as_pointwise(with_h: bool) -> None:
    torch.manual_seed(0)
    g = torch.randn(3, 4, dtype=torch.float64)
    h = torch.randn(3, 4, dtype=torch.float64) * with_h
    for log in (False, True):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        backward(Probe.apply(1, x.log_softmax(-1) if log else x.softmax(-1), g, h), method="bl89")
        p = x.detach().softmax(-1)
        first = 1 - p if log else p - p**2
        second = p**2 - p if log else (p - p**2) * (1 - 2 * p)
        torch.testing.assert_close(x.hess_diag, first**2 * h + second * g, rtol=1e-12, atol=1e-14)


def test_bl89_cross_entropy_is_curved_at_the_true_class_only() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, 1, 1, 0])
    backward(torch.nn.functional.cross_entropy(x, target), method="bl89")
    p = x.detach().softmax(-1)
    expected = torch.nn.functional.one_hot(target, 3) * (p - p**2) / 5
    torch.testing.assert_close(x.hess_diag, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sum", "mean", "nansum", "prod", "cumsum", "cumprod"])
@pytest.mark.parametrize("dims", [(), (-1,)], ids=["of all", "along a dimension"])
def test_reduction_into_another_dtype(name: str, dims: tuple[int, ...], dtype: torch.dtype) -> None:
    """Curvature goes on in the dtype of the input, and is not rounded to half precision on its way."""
    if name.startswith("cum") and not dims:
        pytest.skip("runs along a dimension only")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, exact = torch.eye(4, dtype=dtype, requires_grad=True), torch.eye(4, dtype=torch.float64, requires_grad=True)
    backward(getattr(x @ one, name)(*dims, dtype=torch.float64).square().sum())
    backward(getattr(x.double() @ exact, name)(*dims).square().sum())
    assert one.hess_diag.dtype is torch.float32
    torch.testing.assert_close(one.hess_diag, exact.hess_diag.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_running_sum_of_half_precision_does_not_round(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    backward((x.cumsum(0).float().square() * torch.tensor([1.0, 0.0, 2.0**-14])).sum())
    assert x.hess_diag.tolist() == [2 + 2.0**-13, 2.0**-13, 2.0**-13]
