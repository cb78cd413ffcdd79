"""Special functions, roundings, remainders and random numbers against dense derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, check, with_constants

special = torch.special
SPREAD = torch.linspace(-3.21, 3.17, 24, dtype=torch.float64).reshape(4, 6)
UNIT = torch.linspace(-0.93, 0.91, 12, dtype=torch.float64).reshape(3, 4)
LARGE = torch.rand((3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1.7
INTEGERS = torch.tensor([1, 2, 3, 0])
AB = [(3, 4), (3, 4)]


def bessel(order: int, scaled: bool) -> Callable[[Tensor], Tensor]:
    """An integral over a grid, exact to rounding for a periodic function, as torch differentiates its own only once."""
    angle = (torch.arange(64, dtype=torch.float64) + 0.5) * torch.pi / 64

    def function(x: Tensor) -> Tensor:
        value = (torch.exp(x.unsqueeze(-1) * angle.cos()) * (order * angle).cos()).mean(-1)
        return value * torch.exp(-x.abs()) if scaled else value

    return function


def seeded(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operation(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        return sample(*tensors)

    return operation


def random(name: str, sample: Callable[..., Any], node: str, inputs: Any = None) -> Case:
    return Case(name, seeded(sample), inputs or [(3, 4)], [node])


CASES = [
    Case("log_ndtr", special.log_ndtr, [SPREAD], ["SpecialLogNdtrBackward0"]),
    Case("ndtr", special.ndtr, [SPREAD], ["ErfBackward0"]),
    Case("ndtri", special.ndtri, [UNIT.abs()], ["SpecialNdtriBackward0"]),
    Case("erfinv", torch.erfinv, [UNIT], ["ErfinvBackward0"]),
    Case("erfcx", special.erfcx, [SPREAD], ["SpecialErfcxBackward0"]),
    Case("i0", torch.i0, [SPREAD], ["I0Backward0"], reference=bessel(0, False)),
    Case("i0e", special.i0e, [SPREAD], ["SpecialI0EBackward0"], reference=bessel(0, True)),
    Case("i1", special.i1, [SPREAD], ["SpecialI1Backward0"], reference=bessel(1, False)),
    Case("i1e", special.i1e, [SPREAD], ["SpecialI1EBackward0"], reference=bessel(1, True)),
    Case("sinc", torch.sinc, [SPREAD], ["SincBackward0"]),
    Case("entr", special.entr, [(3, 4)], ["SpecialEntrBackward0"], positive=True),
    Case("polygamma", lambda x: torch.polygamma(1, x), [(3, 4)], ["PolygammaBackward0"], positive=True),
    Case("mvlgamma", lambda x: torch.mvlgamma(x, 3), [LARGE], ["MvlgammaBackward0"]),
    Case(
        "igamma",
        lambda x: special.gammainc(LARGE, x),
        [(3, 4)],
        ["IgammaBackward0"],
        positive=True,
        reference=lambda x: gamma_series(x),
    ),
    Case(
        "igammac",
        lambda x: special.gammaincc(LARGE, x),
        [(3, 4)],
        ["IgammacBackward0"],
        positive=True,
        reference=lambda x: 1 - gamma_series(x),
    ),
    Case("zeta", lambda q: special.zeta(LARGE, q), [(3, 4)], ["SpecialZetaBackward0"], positive=True),
    Case("zeta of a number", lambda q: special.zeta(2.5, q), [(3, 4)], ["SpecialZetaBackward1"], positive=True),
    Case("xlog1py", special.xlog1py, AB, ["SpecialXlog1PyBackward0"], positive=True),
    Case(
        "xlog1py of a number", lambda y: special.xlog1py(2.0, y), [(3, 4)], ["SpecialXlog1PyBackward1"], positive=True
    ),
    Case("xlog1py by a number", lambda x: special.xlog1py(x, 2.0), [(3, 4)], ["SpecialXlog1PyBackward2"]),
    Case("logaddexp2", torch.logaddexp2, [(3, 4), (4,)], ["Logaddexp2Backward0"]),
    Case("deg2rad", torch.deg2rad, [(3, 4)], ["Deg2RadBackward0"]),
    Case("rad2deg", torch.rad2deg, [(3, 4)], ["Rad2DegBackward0"]),
    Case("frac", torch.frac, [SPREAD], ["FracBackward0"]),
    Case("fmod by a number", lambda x: torch.fmod(x, 0.7), [SPREAD], ["FmodBackward0"]),
    Case("remainder by a number", lambda x: x % 0.7, [SPREAD], ["RemainderBackward0"]),
    Case("fmod", torch.fmod, [(3, 4), (4,)], ["FmodBackward1"]),
    Case("remainder", torch.remainder, [(3, 4), (4,)], ["RemainderBackward1"]),
    Case("sgn", torch.sgn, [(3, 4)], ["SgnBackward0"]),
    Case("angle", torch.angle, [(3, 4)], ["AngleBackward0"]),
    Case("copysign", torch.copysign, [(3, 4), (4,)], ["CopysignBackward0"], reference=lambda a, b: a.abs() * b.sign()),
    Case(
        "copysign of a number",
        lambda x: torch.copysign(x, -2.0),
        [(3, 4)],
        ["CopysignBackward1"],
        reference=lambda a: -a.abs(),
    ),
    Case("ldexp", lambda x: torch.ldexp(x, INTEGERS), [(3, 4)], ["LdexpBackward0"]),
    Case("ldexp in both", torch.ldexp, AB, ["LdexpBackward0"]),
    Case("frexp", lambda x: torch.frexp(x).mantissa, [SPREAD], ["FrexpBackward0"]),
    Case(
        "nan_to_num",
        torch.nan_to_num,
        [torch.tensor([1.0, torch.nan, -2.0, torch.inf]).double()],
        ["NanToNumBackward0"],
    ),
    Case(
        "native dropout", seeded(lambda x: torch.native_dropout(x, 0.3, True)[0]), [(3, 4)], ["NativeDropoutBackward0"]
    ),
    Case("dropout", seeded(lambda x: torch.dropout(x, 0.3, True)), [(3, 4)], ["MulBackward0"]),
]

RANDOM = [
    random("bernoulli", lambda x: torch.bernoulli(x), "BernoulliBackward0", [UNIT.abs()]),
    random("bernoulli of tensor", lambda x, p: (x * 1).bernoulli_(p), "BernoulliBackward1", [UNIT, UNIT.abs()]),
    random("bernoulli of number", lambda x: (x * 1).bernoulli_(0.3), "BernoulliBackward2"),
    random("cauchy", lambda x: (x * 1).cauchy_(), "CauchyBackward0"),
    random("exponential", lambda x: (x * 1).exponential_(), "ExponentialBackward0"),
    random("geometric", lambda x: (x * 1).geometric_(0.5), "GeometricBackward0"),
    random("log normal", lambda x: (x * 1).log_normal_(), "LogNormalBackward0"),
    random("normal in place", lambda x: (x * 1).normal_(), "NormalBackward0"),
    random("normal of mean", lambda m: torch.normal(m, 1.0), "NormalBackward1"),
    random("normal of deviation", lambda s: torch.normal(1.0, s), "NormalBackward2", [UNIT.abs()]),
    random("normal of both", lambda m, s: torch.normal(m, s), "NormalBackward3", [UNIT, UNIT.abs()]),
    random("poisson", torch.poisson, "PoissonBackward0", [UNIT.abs()]),
    random("random in a range", lambda x: (x * 1).random_(1, 5), "RandomBackward0"),
    random("random below", lambda x: (x * 1).random_(5), "RandomBackward1"),
    random("random", lambda x: (x * 1).random_(), "RandomBackward2"),
    random("uniform", lambda x: (x * 1).uniform_(), "UniformBackward0"),
]


def gamma_series(x: Tensor) -> Tensor:
    """The regularised lower incomplete gamma function of ``LARGE`` and x: ``x^a e^-x sum_k x^k / Gamma(a + k + 1)``."""
    k = torch.arange(60, dtype=torch.float64)
    x, a = x.unsqueeze(-1), LARGE.unsqueeze(-1)
    return torch.exp((a + k) * x.log() - x - torch.lgamma(a + k + 1)).sum(-1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("function", [special.xlog1py, torch.xlogy])
@pytest.mark.parametrize("number", [-3.0, -1.0, 0.0])
def test_slope_of_a_logarithm_of_a_number_where_it_is_not_finite(
    function: Callable[[Tensor, float], Tensor], number: float
) -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    backward(function(x, number).square().sum())
    slope = function(torch.ones(2), number)
    torch.testing.assert_close(x.hess_diag, 2 * slope * slope, equal_nan=True)


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_samples_carry_no_curvature(case: Case) -> None:
    inputs = case.tensors()
    y = case.operation(*inputs)
    assert case.nodes[0] == y.grad_fn.name()
    backward((y.square() + sum(x.sum() for x in inputs)).sum())
    for x in inputs:
        assert x.hess_diag is None or not x.hess_diag.any()
