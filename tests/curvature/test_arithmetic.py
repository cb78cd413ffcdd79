"""Elementwise functions of several tensors against dense derivatives, and paths that meet again in one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, check, with_constants

aten = torch.ops.aten
AB = [(3, 4), (3, 4)]
LOW = torch.linspace(-1.2, 0.4, 4, dtype=torch.float64)
HIGH = torch.tensor([[1.0, 0.3, 0.2, -0.5]], dtype=torch.float64)  # the last below the lower bound
INTEGERS = torch.tensor([-1, 0, 1, 2])
CASES = [
    Case("add", torch.add, AB, ["AddBackward0"]),
    Case("add broadcast", torch.add, [(3, 4), (4,)], ["AddBackward0"]),
    Case("add alpha", lambda a, b: torch.add(a, b, alpha=-0.5), [(3, 1), (2, 3, 4)], ["AddBackward0"]),
    Case("add number", lambda a: a + 2, [(3, 4)], ["AddBackward0"]),
    Case("add overload for numbers", lambda a: aten.add.Scalar(a, 2.0, 3.0), [(3, 4)], ["AddBackward1"]),
    Case("sub overload for numbers", lambda a: aten.sub.Scalar(a, 2.0, 3.0), [(3, 4)], ["SubBackward1"]),
    Case("mul overload for numbers", lambda a: aten.mul.Scalar(a, 2.0), [(3, 4)], ["MulBackward1"]),
    Case("div overload for numbers", lambda a: aten.div.Scalar(a, 2.0), [(3, 4)], ["DivBackward1"]),
    Case("sub", torch.sub, AB, ["SubBackward0"]),
    Case("sub alpha", lambda a, b: torch.sub(a, b, alpha=3), [(4,), (3, 4)], ["SubBackward0"]),
    Case("rsub", lambda a: 2 - a, [(3, 4)], ["RsubBackward1"]),
    Case("rsub tensor", lambda a, b: torch.rsub(a, b, alpha=2), AB, ["RsubBackward0"]),
    Case("mul", torch.mul, AB, ["MulBackward0"]),
    Case("mul broadcast", torch.mul, [(2, 3, 4), (3, 1)], ["MulBackward0"]),
    Case("mul scalar tensor", torch.mul, [(3, 4), ()], ["MulBackward0"]),
    Case("mul number", lambda a: -3 * a, [(3, 4)], ["MulBackward0"]),
    Case("div", torch.div, AB, ["DivBackward0"], positive=True),
    Case("div broadcast", torch.div, [(4,), (3, 4)], ["DivBackward0"], positive=True),
    Case("div number", lambda a: a / 3, [(3, 4)], ["DivBackward0"]),
    Case("number over", lambda b: 3 / b, [(3, 4)], ["MulBackward0", "ReciprocalBackward0"], positive=True),
    Case("div rounded down", lambda a, b: torch.div(a, b, rounding_mode="floor"), AB, ["DivBackward2"]),
    Case("div with no rounding", lambda a, b: torch.div(a, b, rounding_mode=None), AB, ["DivBackward2"], positive=True),
    Case(
        "div by a number, truncated",
        lambda a: aten.div.Scalar_mode(a, 2.0, rounding_mode="trunc"),
        [(3, 4)],
        ["DivBackward3"],
    ),
    Case("clamp between tensors", torch.clamp, [(3, 4), LOW, HIGH], ["ClampBackward0"]),
    Case("clamp above a tensor", lambda x, low: x.clamp(min=low), [(3, 4), LOW], ["ClampBackward0"]),
    Case("clamp below a tensor", lambda x, high: x.clamp(max=high), [(3, 4), HIGH], ["ClampBackward0"]),
    Case("clamp_min of a tensor", torch.clamp_min, [(3, 4), LOW], ["ClampMinBackward1"]),
    Case("clamp_max of a tensor", torch.clamp_max, [(3, 4), HIGH], ["ClampMaxBackward1"]),
    Case("pow", torch.pow, AB, ["PowBackward1"], positive=True),
    Case("pow broadcast", torch.pow, [(3, 4), (4,)], ["PowBackward1"], positive=True),
    Case("pow of a number", lambda p: 2**p, [(3, 4)], ["PowBackward2"]),
    Case("pow of zero", lambda p: 0**p, [(3, 4)], ["PowBackward2"], positive=True, reference=lambda p: 0 * p),
    Case("addcmul", lambda c, a, b: torch.addcmul(c, a, b, value=0.5), [(3, 4), (4,), (3, 1)], ["AddcmulBackward0"]),
    Case(
        "addcdiv", lambda c, a, b: torch.addcdiv(c, a, b, value=0.5), [(3, 4), (4,), (3, 1)], ["AddcdivBackward0"], True
    ),
    Case("lerp number", lambda a, b: torch.lerp(a, b, 0.3), AB, ["LerpBackward0"]),
    Case("lerp tensor", torch.lerp, [(3, 4), (3, 4), (4,)], ["LerpBackward1"]),
    Case("maximum", torch.maximum, AB, ["MaximumBackward0"]),
    Case("minimum", torch.minimum, [(3, 4), (4,)], ["MinimumBackward0"]),
    Case("maximum with integers", lambda a: torch.maximum(a, INTEGERS), [(3, 4)], ["MaximumBackward0"]),
    Case("minimum of integers", lambda b: torch.minimum(INTEGERS, b), [(3, 4)], ["MinimumBackward0"]),
    Case("maximum of equals", torch.maximum, [torch.ones(3).double(), torch.ones(3).double()], ["MaximumBackward0"]),
    Case("fmax", torch.fmax, AB, ["FmaxBackward0"]),
    Case("fmin", torch.fmin, AB, ["FminBackward0"]),
    Case("fmax of equals", torch.fmax, [torch.ones(3).double(), torch.ones(3).double()], ["FmaxBackward0"]),
    Case("fmin of equals", torch.fmin, [torch.ones(3).double(), torch.ones(3).double()], ["FminBackward0"]),
    Case("atan2", torch.atan2, AB, ["Atan2Backward0"]),
    Case("hypot", torch.hypot, AB, ["HypotBackward0"]),
    Case("logaddexp", torch.logaddexp, [(3, 4), (4,)], ["LogaddexpBackward0"]),
    Case("xlogy", torch.xlogy, AB, ["XlogyBackward0"], positive=True),
    Case("xlogy of a number", lambda y: torch.xlogy(2.0, y), [(3, 4)], ["XlogyBackward1"], positive=True),
    Case("xlogy by a number", lambda x: torch.xlogy(x, 2.0), [(3, 4)], ["XlogyBackward2"], positive=True),
]

#: Local exactness where paths from one tensor meet again.
MEETING = [
    Case("x * x", lambda x: x * x, [(3, 4)]),
    Case("x * 2 x, by the overload for numbers", lambda x: x * aten.mul.Scalar(x, 2.0), [(3, 4)], ["MulBackward1"]),
    Case("x / x^2", lambda x: x / (x * x), [(3, 4)], positive=True),
    Case("x * sigmoid(x)", lambda x: x * torch.sigmoid(x), [(3, 4)]),
    Case("x - tanh(x)", lambda x: x - torch.tanh(x), [(3, 4)]),
    Case("x * tanh(softplus(x))", lambda x: x * torch.tanh(F.softplus(x)), [(3, 4)]),
    Case("gate shared by two tensors", lambda x, y: x * torch.sigmoid(x) * y + y, [(3, 4), (3, 4)]),
    Case("gate of broadcast tensors", lambda x, y: x * torch.sigmoid(x * y) * y, [(3, 4), (4,)]),
    Case("polynomial", lambda x: 1 + x * (2 + x * (3 - x)), [(3, 4)]),
    Case("gelu by hand", lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))), [(3, 4)]),
    Case(
        "gaussian log density", lambda x, m, s: -((x - m) ** 2) / (2 * s**2) - s.log(), [(3, 4), (3, 4), (4,)], (), True
    ),
    Case("exponent of itself", lambda x: x**x, [(3, 4)], positive=True),
    Case("sum of two masks", lambda x: x.relu() + x.clamp(-1, 1), [(3, 4)]),
    Case("weighted masks", lambda x: 0.3 * x.relu() - 0.1 * x.clamp(-1, 1), [(3, 4)]),
    Case("in place", lambda x: (x * 1).mul_(x).add_(x), [(3, 4)]),
]


@pytest.mark.parametrize("case", [*CASES, *MEETING], ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)


def test_division_by_the_number_zero_is_no_error_of_the_rule() -> None:
    for _ in range(3):
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        backward((w / 0.0).square().sum())
        assert w.grad.isinf().all()
        assert not w.hess_diag.isfinite().any()
