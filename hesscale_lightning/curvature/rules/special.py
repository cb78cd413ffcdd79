"""Special functions, roundings and remainders, entry by entry; random numbers, on which nothing depends.

As in :mod:`~hesscale_lightning.curvature.rules.pointwise`, a function is given by ``f'`` and ``f''`` in what
the node saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import elementwise
from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Formula, Operation, Partials, register_rule
from hesscale_lightning.curvature.rules.pointwise import Derivative, unary
from hesscale_lightning.curvature.rules.shape import carried

PartialsFunction = Callable[[bool], Partials]

_i0: Derivative = torch.special.i0
_i0e: Derivative = torch.special.i0e
_i1: Derivative = torch.special.i1
_i1e: Derivative = torch.special.i1e
_erfcx: Derivative = torch.special.erfcx
_ROOT_PI = math.sqrt(math.pi)


# -- the normal distribution -------------------------------------------------------------------------------------------


def _mills(x: Tensor) -> Tensor:
    """``phi(x) / Phi(x)``."""
    return math.sqrt(2 / math.pi) / _erfcx(-x * math.sqrt(0.5))


def _log_ndtr_second(x: Tensor) -> Tensor:
    m = _mills(x)
    return -m * (x + m)


def _ndtri_first(y: Tensor) -> Tensor:
    return math.sqrt(2 * math.pi) * torch.exp(0.5 * y * y)


def _erfinv_first(x: Tensor) -> Tensor:
    return 0.5 * _ROOT_PI * torch.exp(x.erfinv().square())


def _erfcx_first(x: Tensor) -> Tensor:
    return 2 * x * _erfcx(x) - 2 / _ROOT_PI


unary("SpecialLogNdtrBackward0", "self", _mills, _log_ndtr_second)
unary("SpecialNdtriBackward0", "result", _ndtri_first, lambda y: y * _ndtri_first(y).square())
unary("ErfinvBackward0", "self", _erfinv_first, lambda x: 2 * x.erfinv() * _erfinv_first(x).square())
unary("SpecialErfcxBackward0", "self", _erfcx_first, lambda x: 2 * _erfcx(x) + 2 * x * _erfcx_first(x))


# -- Bessel functions: i0' = i1, i1' = i0 - i1/x -----------------------------------------------------------------------


def _over(y: Tensor, x: Tensor) -> Tensor:
    """``y(x) / x`` for one of i1 and i1e, with its limit 1/2 at zero."""
    return torch.where(x == 0, 0.5, y / x)


def _i1_second(x: Tensor) -> Tensor:
    """From Bessel's equation, ``(1 + 1/x^2) i1 - i1'/x``, zero at zero."""
    return ((1 + 1 / (x * x)) * _i1(x) - (_i0(x) - _over(_i1(x), x)) / x).masked_fill(x == 0, 0)


def _i0e_second(x: Tensor) -> Tensor:
    return 2 * _i0e(x) - _over(_i1e(x), x) - 2 * x.sign() * _i1e(x)


def _i1e_first(x: Tensor) -> Tensor:
    return _i0e(x) - _over(_i1e(x), x) - x.sign() * _i1e(x)


def _i1e_second(x: Tensor) -> Tensor:
    slope = _i0e(x) - _over(_i1e(x), x)
    return ((2 + 1 / (x * x)) * _i1e(x) - slope / x - 2 * x.sign() * slope).masked_fill(x == 0, 0)


unary("I0Backward0", "self", _i1, lambda x: _i0(x) - _over(_i1(x), x))
unary("SpecialI0EBackward0", "self", lambda x: _i1e(x) - x.sign() * _i0e(x), _i0e_second)
unary("SpecialI1Backward0", "self", lambda x: _i0(x) - _over(_i1(x), x), _i1_second)
unary("SpecialI1EBackward0", "self", _i1e_first, _i1e_second)


# -- others ------------------------------------------------------------------------------------------------------------


def _sinc_first(x: Tensor) -> Tensor:
    u = math.pi * x
    return ((u.cos() - torch.sinc(x)) / x).masked_fill(x == 0, 0)


def _sinc_second(x: Tensor) -> Tensor:
    u = math.pi * x
    away = -(math.pi**2) * torch.sinc(x) - 2 * (u.cos() - torch.sinc(x)) / (x * x)
    return torch.where(x == 0, -(math.pi**2) / 3, away)


unary("SincBackward0", "self", _sinc_first, _sinc_second)
unary("SpecialEntrBackward0", "self", lambda x: -x.log() - 1, lambda x: -1 / x)


@elementwise("PolygammaBackward0")
def polygamma(op: Operation) -> PartialsFunction:
    """The next order."""
    saved, n = op.node._saved_self, op.node._saved_n
    return lambda _: ((torch.polygamma(n + 1, full(saved)),), {(0, 0): torch.polygamma(n + 2, full(saved))})


@elementwise("MvlgammaBackward0")
def mvlgamma(op: Operation) -> PartialsFunction:
    """``sum_k digamma(x - k/2)`` and ``sum_k trigamma(x - k/2)``, k from 0 to p - 1."""
    saved, p = op.node._saved_self, op.node._saved_p

    def partials(_: bool) -> Partials:
        x = full(saved).unsqueeze(-1) - 0.5 * torch.arange(p, device=saved.device)
        return (torch.digamma(x).sum(-1),), {(0, 0): torch.polygamma(1, x).sum(-1)}

    return partials


@elementwise("IgammaBackward0", "IgammacBackward0")
def incomplete_gamma(op: Operation) -> PartialsFunction:
    """``d = x^(a-1) e^-x / Gamma(a)`` and ``d ((a - 1)/x - 1)``, negative for the upper one; a is a constant."""
    shape, saved = op.node._saved_self, op.node._saved_other
    sign = 1 if op.node.name() == "IgammaBackward0" else -1
    if op.needs[0]:
        raise op.unsupported("torch has no derivative with respect to the first argument")

    def partials(_: bool) -> Partials:
        a, x = full(shape), full(saved)
        density = sign * torch.exp(torch.xlogy(a - 1, x) - x - a.lgamma())
        return (None, density), {(1, 1): density * ((a - 1) / x - 1)}

    return partials


@elementwise("SpecialZetaBackward0", "SpecialZetaBackward1")
def hurwitz_zeta(op: Operation) -> PartialsFunction:
    """``-x zeta(x + 1, q)`` and ``x (x + 1) zeta(x + 2, q)`` in q; torch has no derivative in x."""
    number, saved = op.node._saved_self, op.node._saved_other
    if len(op.needs) > 1 and op.needs[0]:
        raise op.unsupported("torch has no derivative with respect to the first argument")

    def partials(_: bool) -> Partials:
        q = full(saved)
        x = torch.as_tensor(number, dtype=q.dtype, device=q.device)
        first, second = -x * torch.special.zeta(x + 1, q), x * (x + 1) * torch.special.zeta(x + 2, q)
        return ((None, first), {(1, 1): second}) if len(op.needs) > 1 else ((first,), {(0, 0): second})

    return partials


@elementwise("SpecialXlog1PyBackward0")
def xlog1py(op: Operation) -> PartialsFunction:
    """``x log(1 + y)``: ``log(1 + y)``, ``x/(1 + y)``; ``f_xy = 1/(1 + y)``, ``f_yy = -x/(1 + y)^2``."""
    saved_x, saved_y = op.node._saved_self, op.node._saved_other
    op.curved = op.needs[1]

    def partials(_: bool) -> Partials:
        x, y = full(saved_x), full(saved_y)
        inverse = 1 / (1 + y)
        by_x = torch.log1p(y).masked_fill((x == 0) & (y <= -1), 0)
        return (by_x, x * inverse), {(0, 1): inverse, (1, 1): -x * inverse * inverse}

    return partials


@elementwise("SpecialXlog1PyBackward1")
def xlog1py_number_first(op: Operation) -> PartialsFunction:
    x, saved = float(op.node._saved_self), op.node._saved_other

    def partials(_: bool) -> Partials:
        inverse = 1 / (1 + full(saved))
        return (x * inverse,), {(0, 0): -x * inverse * inverse}

    return partials


@elementwise("SpecialXlog1PyBackward2", curved=False)
def xlog1py_number_last(op: Operation) -> PartialsFunction:
    slope = math.log1p(float(op.node._saved_other))
    return lambda _: ((slope,), {})


@elementwise("Logaddexp2Backward0")
def logaddexp2(op: Operation) -> PartialsFunction:
    """With ``s = sigmoid((a - b) ln 2)``: ``s``, ``1 - s``; ``f_aa = f_bb = ln 2 s (1 - s) = -f_ab``."""
    saved_a, saved_b = op.node._saved_self, op.node._saved_other

    def partials(_: bool) -> Partials:
        share = torch.sigmoid((full(saved_a) - full(saved_b)) * math.log(2))
        bend = math.log(2) * share * (1 - share)
        return (share, 1 - share), {(0, 0): bend, (0, 1): -bend, (1, 1): bend}

    return partials


# -- piecewise linear --------------------------------------------------------------------------------------------------


@elementwise("Deg2RadBackward0", curved=False)
def deg2rad(op: Operation) -> PartialsFunction:
    """``pi / 180``."""
    return lambda _: ((math.pi / 180,), {})


@elementwise("Rad2DegBackward0", curved=False)
def rad2deg(op: Operation) -> PartialsFunction:
    """``180 / pi``."""
    return lambda _: ((180 / math.pi,), {})


@elementwise("FracBackward0", "FmodBackward0", "RemainderBackward0", curved=False)
def remainder_of_number(op: Operation) -> PartialsFunction:
    """``x`` minus a step function."""
    return lambda _: ((1.0,), {})


@elementwise("FmodBackward1", "RemainderBackward1", curved=False)
def remainder(op: Operation) -> PartialsFunction:
    """``a - b [a/b]``, rounded toward zero for fmod and down for remainder."""
    a, b = op.node._saved_self, op.node._saved_other
    mode = "trunc" if op.node.name() == "FmodBackward1" else "floor"
    by_divisor = op.needs[1]
    return lambda _: ((1.0, -torch.div(full(a), full(b), rounding_mode=mode) if by_divisor else None), {})


@elementwise("SgnBackward0", "AngleBackward0", curved=False)
def phase(op: Operation) -> PartialsFunction:
    """Zero slope for real numbers."""
    return lambda _: ((0.0,), {})


@elementwise("CopysignBackward0", "CopysignBackward1", curved=False)
def copysign(op: Operation) -> PartialsFunction:
    """``|a|`` with the sign of b, in which it is flat."""
    x, y, inputs = op.node._saved_self, op.node._saved_result, len(op.needs)
    return lambda _: ((full(x).sign() * full(y).sign(), 0.0)[:inputs], {})


@elementwise("LdexpBackward0")
def ldexp(op: Operation) -> PartialsFunction:
    """``x 2^n``: ``2^n``, ``y ln 2``; ``f_xn = 2^n ln 2``, ``f_nn = y ln^2 2``."""
    exponent, result = op.node._saved_other, op.node._saved_result
    op.curved = op.needs[1]

    def partials(_: bool) -> Partials:
        y = full(result)
        power = torch.exp2(exponent.to(y.dtype))
        slope = y * math.log(2)
        return (power, slope), {(0, 1): power * math.log(2), (1, 1): slope * math.log(2)}

    return partials


@elementwise("NanToNumBackward0", curved=False)
def nan_to_num(op: Operation) -> PartialsFunction:
    """Zero slope where something was replaced."""
    x = op.node._saved_self
    return lambda _: ((x.isfinite(),), {})


@elementwise("NativeDropoutBackward0", curved=False)
def dropout(op: Operation) -> PartialsFunction:
    """The mask, scaled."""
    kept, p = op.node._saved_result1, op.node._saved_p
    scale = torch.as_tensor(0.0 if p == 1 else 1 / (1 - p), dtype=carried(op.input_meta(0)[0]), device=kept.device)
    return lambda _: ((kept.to(scale.dtype) * scale,), {})


@register_rule(
    "BernoulliBackward0", "BernoulliBackward1", "BernoulliBackward2", "CauchyBackward0", "ExponentialBackward0",
    "GeometricBackward0", "LogNormalBackward0", "NormalBackward0", "NormalBackward1", "NormalBackward2",
    "NormalBackward3", "PoissonBackward0", "RandomBackward0", "RandomBackward1", "RandomBackward2", "UniformBackward0",
)  # fmt: skip
def random(op: Operation) -> Formula:
    """A sample, which for autograd does not depend on the tensors that it was drawn with or written over."""
    nothing = (None,) * len(op.needs)
    return lambda h: nothing
