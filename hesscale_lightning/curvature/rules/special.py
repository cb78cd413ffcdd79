"""Special functions, roundings and remainders, entry by entry; random numbers, on which nothing depends.

As in :mod:`~hesscale_lightning.curvature.rules.pointwise`, a function is given by ``f'`` and ``f''`` in what
the node saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.rules.arithmetic import log_of_number
from hesscale_lightning.curvature.rules.pointwise import Derivative, unary
from hesscale_lightning.curvature.values import ZERO, Value

_i0: Derivative = torch.special.i0
_i0e: Derivative = torch.special.i0e
_i1: Derivative = torch.special.i1
_i1e: Derivative = torch.special.i1e
_erfcx: Derivative = torch.special.erfcx
_ROOT_PI = math.sqrt(math.pi)


# -- the normal distribution -------------------------------------------------------------------------------------------


def _mills(x: Value) -> Value:
    """``phi(x) / Phi(x)``."""
    return math.sqrt(2 / math.pi) / _erfcx(-x * math.sqrt(0.5))


def _log_ndtr_second(x: Value) -> Value:
    m = _mills(x)
    return -m * (x + m)


def _ndtri_first(y: Value) -> Value:
    return math.sqrt(2 * math.pi) * torch.exp(0.5 * y * y)


def _erfinv_first(x: Value) -> Value:
    return 0.5 * _ROOT_PI * torch.exp(x.erfinv().square())


def _erfcx_first(x: Value) -> Value:
    return 2 * x * _erfcx(x) - 2 / _ROOT_PI


unary("SpecialLogNdtrBackward0", "self", _mills, _log_ndtr_second)
unary("SpecialNdtriBackward0", "result", _ndtri_first, lambda y: y * _ndtri_first(y).square())
unary("ErfinvBackward0", "self", _erfinv_first, lambda x: 2 * x.erfinv() * _erfinv_first(x).square())
unary("SpecialErfcxBackward0", "self", _erfcx_first, lambda x: 2 * _erfcx(x) + 2 * x * _erfcx_first(x))


# -- Bessel functions: i0' = i1, i1' = i0 - i1/x -----------------------------------------------------------------------


def _over(y: Value, x: Value) -> Value:
    """``y(x) / x`` for one of i1 and i1e, with its limit 1/2 at zero."""
    return torch.where(x == 0, 0.5, y / x)


def _i1_second(x: Value) -> Value:
    """From Bessel's equation, ``(1 + 1/x^2) i1 - i1'/x``, zero at zero."""
    return ((1 + 1 / (x * x)) * _i1(x) - (_i0(x) - _over(_i1(x), x)) / x).masked_fill(x == 0, 0)


def _i0e_second(x: Value) -> Value:
    return 2 * _i0e(x) - _over(_i1e(x), x) - 2 * x.sign() * _i1e(x)


def _i1e_first(x: Value) -> Value:
    return _i0e(x) - _over(_i1e(x), x) - x.sign() * _i1e(x)


def _i1e_second(x: Value) -> Value:
    slope = _i0e(x) - _over(_i1e(x), x)
    return ((2 + 1 / (x * x)) * _i1e(x) - slope / x - 2 * x.sign() * slope).masked_fill(x == 0, 0)


unary("I0Backward0", "self", _i1, lambda x: _i0(x) - _over(_i1(x), x))
unary("SpecialI0EBackward0", "self", lambda x: _i1e(x) - x.sign() * _i0e(x), _i0e_second)
unary("SpecialI1Backward0", "self", lambda x: _i0(x) - _over(_i1(x), x), _i1_second)
unary("SpecialI1EBackward0", "self", _i1e_first, _i1e_second)


# -- others ------------------------------------------------------------------------------------------------------------


def _sinc_first(x: Value) -> Value:
    u = math.pi * x
    return ((u.cos() - torch.sinc(x)) / x).masked_fill(x == 0, 0)


def _sinc_second(x: Value) -> Value:
    u = math.pi * x
    away = -(math.pi**2) * torch.sinc(x) - 2 * (u.cos() - torch.sinc(x)) / (x * x)
    return torch.where(x == 0, -(math.pi**2) / 3, away)


unary("SincBackward0", "self", _sinc_first, _sinc_second)
unary("SpecialEntrBackward0", "self", lambda x: -x.log() - 1, lambda x: -1 / x)


@register_rule("PolygammaBackward0", elementwise=True)
def polygamma(op: Operation) -> Any:
    """The next order."""
    x, n = op.input(0, "self"), op.number("n")
    return torch.polygamma(n + 1, x), torch.polygamma(n + 2, x)


@register_rule("MvlgammaBackward0", elementwise=True)
def mvlgamma(op: Operation) -> Any:
    """``sum_k digamma(x - k/2)`` and ``sum_k trigamma(x - k/2)``, k from 0 to p - 1."""
    x = op.input(0, "self")
    shifted = [x - 0.5 * k for k in range(op.number("p"))]
    return sum(torch.digamma(z) for z in shifted), sum(torch.polygamma(1, z) for z in shifted)


def _only_by_second(op: Operation) -> None:
    if len(op.needs) > 1 and op.need(0):
        raise op.unsupported("torch has no derivative with respect to the first argument")


@register_rule("IgammaBackward0", "IgammacBackward0", elementwise=True, curved=(1,), check=_only_by_second)
def incomplete_gamma(op: Operation) -> Any:
    """``d = x^(a-1) e^-x / Gamma(a)`` and ``d ((a - 1)/x - 1)``, negative for the upper one; a is a constant."""
    a, x = op.input(0, "self"), op.input(1, "other")
    density = torch.exp(torch.xlogy(a - 1, x) - x - a.lgamma())
    if op.name == "IgammacBackward0":
        density = -density
    return (None, density), {(1, 1): density * ((a - 1) / x - 1)}


def _zeta_by_q(x: Value, q: Value) -> tuple[Value, Value]:
    return -x * torch.special.zeta(x + 1, q), x * (x + 1) * torch.special.zeta(x + 2, q)


@register_rule("SpecialZetaBackward0", elementwise=True, curved=(1,), check=_only_by_second)
def hurwitz_zeta(op: Operation) -> Any:
    """``-x zeta(x + 1, q)`` and ``x (x + 1) zeta(x + 2, q)`` in q; torch has no derivative in x."""
    first, second = _zeta_by_q(op.input(0, "self"), op.input(1, "other"))
    return (None, first), {(1, 1): second}


@register_rule("SpecialZetaBackward1", elementwise=True)
def hurwitz_zeta_of_number(op: Operation) -> Any:
    """As with a tensor ``x``."""
    return _zeta_by_q(float(op.number("self")), op.input(0, "other"))


@register_rule("SpecialXlog1PyBackward0", elementwise=True, curved=(1,))
def xlog1py(op: Operation) -> Any:
    """``x log(1 + y)``: ``log(1 + y)``, ``x/(1 + y)``; ``f_xy = 1/(1 + y)``, ``f_yy = -x/(1 + y)^2``."""
    x, y = op.input(0, "self"), op.input(1, "other")
    inverse = 1 / (1 + y)
    slope = x * inverse
    return (torch.log1p(y).masked_fill((x == 0) & (y <= -1), 0), slope), {(0, 1): inverse, (1, 1): -slope * inverse}


@register_rule("SpecialXlog1PyBackward1", elementwise=True)
def xlog1py_number_first(op: Operation) -> Any:
    """``x log(1 + y)`` with a number ``x``."""
    inverse = 1 / (1 + op.input(0, "other"))
    slope = float(op.number("self")) * inverse
    return slope, -slope * inverse


@register_rule("SpecialXlog1PyBackward2", elementwise=True, curved=False)
def xlog1py_number_last(op: Operation) -> Any:
    """``x log(1 + y)`` with a number ``y``."""
    y = float(op.number("other"))
    return math.log1p(y) if y > -1 else log_of_number(1 + y), None


@register_rule("Logaddexp2Backward0", elementwise=True)
def logaddexp2(op: Operation) -> Any:
    """With ``s = sigmoid((a - b) ln 2)``: ``s``, ``1 - s``; ``f_aa = f_bb = ln 2 s (1 - s) = -f_ab``."""
    share = torch.sigmoid((op.input(0, "self") - op.input(1, "other")) * math.log(2))
    bend = math.log(2) * share * (1 - share)
    return (share, 1 - share), {(0, 0): bend, (0, 1): -bend, (1, 1): bend}


# -- piecewise linear --------------------------------------------------------------------------------------------------


@register_rule("Deg2RadBackward0", elementwise=True, curved=False)
def deg2rad(op: Operation) -> Any:
    """``pi / 180``."""
    return math.pi / 180, None


@register_rule("Rad2DegBackward0", elementwise=True, curved=False)
def rad2deg(op: Operation) -> Any:
    """``180 / pi``."""
    return 180 / math.pi, None


@register_rule("FracBackward0", "FmodBackward0", "RemainderBackward0", elementwise=True, curved=False)
def remainder_of_number(op: Operation) -> Any:
    """``x`` minus a step function."""
    return 1.0, None


@register_rule("FmodBackward1", "RemainderBackward1", elementwise=True, curved=False)
def remainder(op: Operation) -> Any:
    """``a - b [a/b]``, rounded toward zero for fmod and down for remainder."""
    if not op.need(1):  # then neither is saved
        return (1.0, None), {}
    mode = "trunc" if op.name == "FmodBackward1" else "floor"
    return (1.0, -torch.div(op.input(0, "self"), op.input(1, "other"), rounding_mode=mode)), {}


@register_rule("SgnBackward0", "AngleBackward0", elementwise=True, curved=False)
def phase(op: Operation) -> Any:
    """Zero slope for real numbers."""
    return 0.0, None


@register_rule("CopysignBackward0", "CopysignBackward1", elementwise=True, curved=False)
def copysign(op: Operation) -> Any:
    """``|a|`` with the sign of b, in which it is flat."""
    return (op.input(0, "self").sign() * op.output("result").sign() if op.need(0) else None, 0.0), {}


@register_rule("LdexpBackward0", elementwise=True, curved=(1,))
def ldexp(op: Operation) -> Any:
    """``x 2^n``: ``2^n``, ``y ln 2``; ``f_xn = 2^n ln 2``, ``f_nn = y ln^2 2``."""
    n, y = op.input(1, "other"), op.output("result")
    slope = y * math.log(2)
    bend = slope * math.log(2)
    if not op.need(0):  # then n is not saved
        return (None, slope), {(1, 1): bend}
    power = torch.exp2(n.to(y.dtype))
    return (power, slope), {(0, 1): power * math.log(2), (1, 1): bend}


@register_rule("FrexpBackward0")
def frexp(op: Operation, h: Value) -> Value:
    """The mantissa ``x 2^-n``; the exponent n is a step function."""
    return h * torch.exp2(-2 * op.tensor("exponent").to(op.input_dtype(0)))


@register_rule("NanToNumBackward0", elementwise=True, curved=False)
def nan_to_num(op: Operation) -> Any:
    """Zero slope where something was replaced."""
    return op.input(0, "self").isfinite(), None


@register_rule("NativeDropoutBackward0", elementwise=True, curved=False)
def dropout(op: Operation) -> Any:
    """The mask times ``1 / (1 - p)``."""
    p = op.number("p")
    # Nodes do not tell of train=False, with which only a direct call of torch.native_dropout makes one.
    return op.tensor("result1").to(op.input_dtype(0)) * (0.0 if p == 1 else 1 / (1 - p)), None


@register_rule(
    "BernoulliBackward0", "BernoulliBackward1", "BernoulliBackward2", "CauchyBackward0", "ExponentialBackward0",
    "GeometricBackward0", "LogNormalBackward0", "NormalBackward0", "NormalBackward1", "NormalBackward2",
    "NormalBackward3", "PoissonBackward0", "RandomBackward0", "RandomBackward1", "RandomBackward2", "UniformBackward0",
)  # fmt: skip
def random(op: Operation, h: Value) -> Sequence[Value]:
    """A sample, which for autograd does not depend on the tensors that it was drawn with or written over."""
    return (ZERO,) * len(op.needs)
