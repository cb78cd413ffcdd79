"""Functions of one tensor against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check, with_constants

#: From -3.2 to 3.2 in uneven steps: both sides of every kink, none on one.
SPREAD = torch.linspace(-3.21, 3.17, 24, dtype=torch.float64).reshape(4, 6)
UNIT = torch.linspace(-0.93, 0.91, 12, dtype=torch.float64).reshape(3, 4)


def spread(name: str, operation: object, node: str) -> Case:
    return Case(name, operation, [SPREAD], [node])  # type: ignore[arg-type]


ACTIVATIONS = [
    spread("relu", F.relu, "ReluBackward0"),
    spread("leaky_relu", lambda x: F.leaky_relu(x, 0.1), "LeakyReluBackward0"),
    spread("leaky_relu in place", lambda x: F.leaky_relu(x * 1, 0.1, inplace=True), "LeakyReluBackward1"),
    spread("elu", lambda x: F.elu(x, 0.7), "EluBackward0"),
    spread("elu in place", lambda x: F.elu(x * 1, 0.7, inplace=True), "EluBackward1"),
    spread("selu", F.selu, "EluBackward0"),
    spread("selu in place", lambda x: F.selu(x * 1, inplace=True), "EluBackward1"),
    spread("celu", lambda x: F.celu(x, 0.5), "CeluBackward0"),
    spread("celu in place", lambda x: F.celu(x * 1, 0.5, inplace=True), "CeluBackward1"),
    spread("gelu", F.gelu, "GeluBackward0"),
    spread("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), "GeluBackward0"),
    spread("silu", F.silu, "SiluBackward0"),
    spread("mish", F.mish, "MishBackward0"),
    spread("softplus", F.softplus, "SoftplusBackward0"),
    spread("softplus with threshold", lambda x: F.softplus(x, beta=2.0, threshold=3.0), "SoftplusBackward0"),
    spread("logsigmoid", F.logsigmoid, "LogSigmoidBackward0"),
    spread("tanh", torch.tanh, "TanhBackward0"),
    spread("sigmoid", torch.sigmoid, "SigmoidBackward0"),
    spread("hardtanh", lambda x: F.hardtanh(x, -1.0, 2.0), "HardtanhBackward0"),
    spread("relu6", lambda x: F.relu6(3 * x), "HardtanhBackward0"),
    spread("hardswish", lambda x: F.hardswish(1.5 * x), "HardswishBackward0"),
    Case(
        "hardsigmoid",
        lambda x: F.hardsigmoid(1.5 * x),
        [SPREAD],
        ["HardsigmoidBackward0"],
        reference=lambda x: F.relu6(1.5 * x + 3) / 6,
    ),
    spread("softsign", F.softsign, "DivBackward0"),
    spread("tanhshrink", F.tanhshrink, "SubBackward0"),
    spread("hardshrink", F.hardshrink, "HardshrinkBackward0"),
    spread("softshrink", F.softshrink, "SoftshrinkBackward0"),
    spread("threshold", lambda x: F.threshold(x, 0.3, -1.0), "ThresholdBackward0"),
    spread("threshold in place", lambda x: F.threshold(x * 1, 0.3, -1.0, inplace=True), "ThresholdBackward1"),
    spread("rrelu in eval mode", F.rrelu, "RreluWithNoiseBackward0"),
    spread("rrelu in place", lambda x: F.rrelu(x * 1, inplace=True), "RreluWithNoiseBackward1"),
    Case("prelu", F.prelu, [SPREAD, (1,)], ["PreluKernelBackward0"]),
    Case("prelu per channel", F.prelu, [(2, 3, 4), (3,)], ["PreluKernelBackward0"]),
]


def rrelu_training(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.rrelu(x, training=True)


CASES = [
    *ACTIVATIONS,
    spread("rrelu in training", rrelu_training, "RreluWithNoiseBackward0"),
    spread("exp", torch.exp, "ExpBackward0"),
    spread("exp2", torch.exp2, "Exp2Backward0"),
    spread("expm1", torch.expm1, "Expm1Backward0"),
    Case("log", torch.log, [(3, 4)], ["LogBackward0"], positive=True),
    Case("log2", torch.log2, [(3, 4)], ["Log2Backward0"], positive=True),
    Case("log10", torch.log10, [(3, 4)], ["Log10Backward0"], positive=True),
    Case("log1p", torch.log1p, [(3, 4)], ["Log1PBackward0"], positive=True),
    Case("sqrt", torch.sqrt, [(3, 4)], ["SqrtBackward0"], positive=True),
    Case("rsqrt", torch.rsqrt, [(3, 4)], ["RsqrtBackward0"], positive=True),
    spread("reciprocal", torch.reciprocal, "ReciprocalBackward0"),
    spread("sin", torch.sin, "SinBackward0"),
    spread("cos", torch.cos, "CosBackward0"),
    Case("tan", torch.tan, [UNIT], ["TanBackward0"]),
    Case("asin", torch.asin, [UNIT], ["AsinBackward0"]),
    Case("acos", torch.acos, [UNIT], ["AcosBackward0"]),
    spread("atan", torch.atan, "AtanBackward0"),
    spread("sinh", torch.sinh, "SinhBackward0"),
    spread("cosh", torch.cosh, "CoshBackward0"),
    spread("asinh", torch.asinh, "AsinhBackward0"),
    Case("acosh", lambda x: torch.acosh(x + 1), [(3, 4)], ["AcoshBackward0"], positive=True),
    Case("atanh", torch.atanh, [UNIT], ["AtanhBackward0"]),
    spread("erf", torch.erf, "ErfBackward0"),
    spread("erfc", torch.erfc, "ErfcBackward0"),
    Case("lgamma", torch.lgamma, [(3, 4)], ["LgammaBackward0"], positive=True),
    Case("digamma", torch.digamma, [(3, 4)], ["DigammaBackward0"], positive=True),
    Case("glu", F.glu, [(3, 4)], ["GluBackward0"]),
    Case("glu of dimension 0", lambda x: F.glu(x, 0), [(4, 3)], ["GluBackward0"]),
    spread("abs", torch.abs, "AbsBackward0"),
    spread("neg", torch.neg, "NegBackward0"),
    spread("round", torch.round, "RoundBackward0"),
    spread("round to decimals", lambda x: torch.round(x, decimals=1), "RoundBackward1"),
    spread("floor", torch.floor, "FloorBackward0"),
    spread("ceil", torch.ceil, "CeilBackward0"),
    spread("trunc", torch.trunc, "TruncBackward0"),
    spread("sign", torch.sign, "SignBackward0"),
    Case("logit", torch.logit, [UNIT.abs()], ["LogitBackward0"]),
    Case("logit with eps", lambda x: torch.logit(x, eps=0.2), [UNIT.abs()], ["LogitBackward0"]),
    spread("square", torch.square, "PowBackward0"),
    spread("cube", lambda x: x**3, "PowBackward0"),
    spread("inverse square", lambda x: x**-2, "PowBackward0"),
    spread("first power", lambda x: x**1.0, "PowBackward0"),
    spread("zeroth power", lambda x: x**0.0, "PowBackward0"),
    Case("fractional power", lambda x: x**1.5, [(3, 4)], ["PowBackward0"], positive=True),
    spread("clamp", lambda x: x.clamp(-1.0, 2.0), "ClampBackward1"),
    spread("clamp below", lambda x: x.clamp(min=-1.0), "ClampBackward1"),
    spread("clamp_min", lambda x: torch.clamp_min(x, -1.0), "ClampMinBackward0"),
    spread("clamp_max", lambda x: torch.clamp_max(x, 1.0), "ClampMaxBackward0"),
    Case(
        "clamp at its bounds",
        lambda x: x.clamp(-1.0, 1.0),
        [torch.tensor([-1.0, 0.0, 1.0]).double()],
        ["ClampBackward1"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", ACTIVATIONS, ids=lambda case: case.name)
def test_activation_in_float32(case: Case) -> None:
    check(case, torch.float32)
