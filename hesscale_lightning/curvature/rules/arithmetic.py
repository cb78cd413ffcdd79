"""Sums, products and other elementwise functions of several tensors, with broadcasting.

Each is given by its partials (see :mod:`hesscale_lightning.curvature.elementwise`): first derivatives by each input,
second derivatives by pairs. Mixed ones play no part for the operation alone; they carry the cross terms where its
inputs come from one tensor, as in ``x * x``. Torch saves many an operand only where the derivative that contains it is
needed: one that is not saved is None, and so is that derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hesscale_lightning.curvature.operation import Operation, carried
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.rules.pointwise import between

# -- sums and products -----------------------------------------------------------------------------------------------


def _alpha(op: Operation) -> float:
    return float(op.number("alpha")) if op.has("alpha") else 1.0


@register_rule("AddBackward0", "AddBackward1", elementwise=True, curved=False)
def add(op: Operation) -> Any:
    """``a + alpha b``."""
    return (1.0, _alpha(op)), {}


@register_rule("SubBackward0", "SubBackward1", elementwise=True, curved=False)
def sub(op: Operation) -> Any:
    """``a - alpha b``."""
    return (1.0, -_alpha(op)), {}


@register_rule("RsubBackward0", "RsubBackward1", elementwise=True, curved=False)
def rsub(op: Operation) -> Any:
    """``b - alpha a``."""
    return (-_alpha(op), 1.0), {}


@register_rule("MulBackward0", elementwise=True, curved=False)
def mul(op: Operation) -> Any:
    """``a b``."""
    return (op.operand("other", 1), op.operand("self", 0)), {(0, 1): 1.0}


@register_rule("MulBackward1", elementwise=True, curved=False)
def mul_number(op: Operation) -> Any:
    """``a b`` with a number ``b``."""
    return op.operand("other"), None


def _rounded(op: Operation) -> bool:
    return op.has("rounding_mode") and op.number("rounding_mode") is not None


def _by_divisor(op: Operation) -> bool:
    return len(op.needs) > 1 and op.need(1)


@register_rule(
    "DivBackward0", "DivBackward1", "DivBackward2", "DivBackward3",
    elementwise=True, curved=lambda op: _by_divisor(op) and not _rounded(op),
)  # fmt: skip
def div(op: Operation) -> Any:
    """``a / b``: ``1/b``, ``-a/b^2``; ``f_ab = -1/b^2``, ``f_bb = 2 a/b^3``. Flat if the quotient is rounded."""
    if _rounded(op):
        return (0.0, 0.0), {}
    inverse = 1 / op.operand("other", 1 if len(op.needs) > 1 else None)
    if not _by_divisor(op):
        return (inverse, None), {}
    slope = -inverse * inverse
    bend = op.operand("self", 0) * slope
    return (inverse, bend), {(0, 1): slope, (1, 1): -2 * bend * inverse}


@register_rule("AddcmulBackward0", elementwise=True, curved=False)
def addcmul(op: Operation) -> Any:
    """``c + value a b``."""
    a, b, value = op.input(1, "tensor1"), op.input(2, "tensor2"), float(op.number("value"))
    return (1.0, None if b is None else value * b, None if a is None else value * a), {(1, 2): value}


@register_rule("AddcdivBackward0", elementwise=True, curved=(2,))
def addcdiv(op: Operation) -> Any:
    """``c + value a / b``."""
    if not op.need(1) and not op.need(2):
        return (1.0, None, None), {}
    inverse, value = 1 / op.input(2, "tensor2"), float(op.number("value"))
    if not op.need(2):
        return (1.0, value * inverse, None), {}
    slope = -value * inverse * inverse
    bend = op.input(1, "tensor1") * slope
    return (1.0, value * inverse, bend), {(1, 2): slope, (2, 2): -2 * bend * inverse}


@register_rule("LerpBackward0", elementwise=True, curved=False)
def lerp_number(op: Operation) -> Any:
    """``(1 - w) a + w b`` with a number ``w``."""
    weight = op.operand("weight")
    return (1 - weight, weight), {}


@register_rule("LerpBackward1", elementwise=True, curved=False)
def lerp_tensor(op: Operation) -> Any:
    """``a + w (b - a)``."""
    a, b, w = op.input(0, "self"), op.input(1, "end"), op.input(2, "weight")
    return (None if w is None else 1 - w, w, b - a if op.need(2) else None), {(0, 2): -1.0, (1, 2): 1.0}


# -- powers and logarithms -------------------------------------------------------------------------------------------


def log_of_number(x: float) -> float:
    """As torch has it: minus infinity at zero, NaN below."""
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


@register_rule("PowBackward1", elementwise=True)
def pow_tensor(op: Operation) -> Any:
    """``y = x^p``: ``f_xx = p (p-1) x^(p-2)``, ``f_xp = x^(p-1) (1 + p ln x)``, ``f_pp = y ln^2 x``."""
    x, p, y = op.input(0, "self"), op.input(1, "exponent"), op.output("result")
    power = x ** (p - 1)
    by_x = torch.where(p == 0, 0.0, p * power)
    by_x_twice = torch.where((p == 0) | (p == 1), 0.0, p * (p - 1) * x ** (p - 2))
    if not op.need(1):
        return (by_x, None), {(0, 0): by_x_twice}
    log = x.log().masked_fill((x == 0) & (p >= 0), 0.0)
    return (by_x, y * log), {(0, 0): by_x_twice, (0, 1): power * (1 + p * log), (1, 1): y * log * log}


@register_rule("PowBackward2", elementwise=True)
def pow_base(op: Operation) -> Any:
    """``c^p`` with a number ``c``."""
    y, base = op.output("result"), op.number("self")
    log = log_of_number(base) if base else 0.0  # a power of zero is flat
    return y * log, y * log * log


@register_rule("XlogyBackward0", elementwise=True, curved=(1,))
def xlogy(op: Operation) -> Any:
    """``x log y``: ``log y``, ``x/y``; ``f_xy = 1/y``, ``f_yy = -x/y^2``."""
    x, y = op.input(0, "self"), op.input(1, "other")
    inverse = 1 / y
    slope = x * inverse
    return (y.log().masked_fill((x == 0) & (y <= 0), 0), slope), {(0, 1): inverse, (1, 1): -slope * inverse}


@register_rule("XlogyBackward1", elementwise=True)
def xlogy_number_first(op: Operation) -> Any:
    """``x log y`` with a number ``x``."""
    y = op.input(0, "other")
    slope = float(op.number("self")) / y
    return slope, -slope / y


@register_rule("XlogyBackward2", elementwise=True, curved=False)
def xlogy_number_last(op: Operation) -> Any:
    """``x log y`` with a number ``y``."""
    return log_of_number(op.number("other")), None


@register_rule("LogaddexpBackward0", elementwise=True)
def logaddexp(op: Operation) -> Any:
    """With ``s = sigmoid(a - b)``: ``s``, ``1 - s``; ``f_aa = f_bb = s (1 - s) = -f_ab``."""
    share = torch.sigmoid(op.input(0, "self") - op.input(1, "other"))
    bend = share * (1 - share)
    return (share, 1 - share), {(0, 0): bend, (0, 1): -bend, (1, 1): bend}


# -- the plane -------------------------------------------------------------------------------------------------------


@register_rule("Atan2Backward0", elementwise=True)
def atan2(op: Operation) -> Any:
    """With ``r = a^2 + b^2``: ``b/r``, ``-a/r``; ``f_aa = -2 a b/r^2 = -f_bb``, ``f_ab = (a^2 - b^2)/r^2``."""
    a, b = op.input(0, "self"), op.input(1, "other")
    r = a * a + b * b
    by_a, by_b = b / r, -a / r
    bend = 2 * by_a * by_b
    return (by_a, by_b), {(0, 0): bend, (0, 1): by_b * by_b - by_a * by_a, (1, 1): -bend}


@register_rule("HypotBackward0", elementwise=True)
def hypot(op: Operation) -> Any:
    """``y = sqrt(a^2 + b^2)``: ``c = a/y``, ``s = b/y``; ``f_aa = s^2/y``, ``f_ab = -c s/y``, ``f_bb = c^2/y``."""
    a, b, y = op.input(0, "self"), op.input(1, "other"), op.output("result")
    if b is None:
        c = a / y
        return (c, None), {(0, 0): (1 - c * c) / y}
    if a is None:
        s = b / y
        return (None, s), {(1, 1): (1 - s * s) / y}
    c, s = a / y, b / y
    return (c, s), {(0, 0): s * s / y, (0, 1): -c * s / y, (1, 1): c * c / y}


# -- the larger and the smaller --------------------------------------------------------------------------------------


@register_rule("MaximumBackward0", "MinimumBackward0", elementwise=True, curved=False)
def extremum(op: Operation) -> Any:
    """The selected input has slope 1; on a tie torch gives each of the two 1/2."""
    a, b = op.input(0, "self"), op.input(1, "other")
    if op.name in ("MinimumBackward0", "FminBackward0"):
        a, b = b, a
    half = 1 - 0.5 * (a == b).to(carried(op.output_dtype()))
    return (half.masked_fill(a < b, 0), half.masked_fill(a > b, 0)), {}


def _shares_ties() -> bool:
    """Whether fmax, as maximum, gives each of two equal inputs 1/2: since torch 2.14."""
    with torch.enable_grad():
        x = torch.zeros((), requires_grad=True)
        return bool(torch.autograd.grad(torch.fmax(x, torch.zeros(())), x)[0] == 0.5)


_FMAX_SHARES_TIES = _shares_ties()


@register_rule("FmaxBackward0", "FminBackward0", elementwise=True, curved=False)
def extremum_ignoring_nan(op: Operation) -> Any:
    """The selected input has slope 1; on a tie the first, and each of the two 1/2 since torch 2.14."""
    if _FMAX_SHARES_TIES:
        return extremum(op)
    a, b = op.input(0, "self"), op.input(1, "other")
    first = ((a >= b) if op.name == "FmaxBackward0" else (a <= b)) | b.isnan()
    return (first, ~first), {}


@register_rule("ClampBackward0", "ClampMinBackward1", "ClampMaxBackward1", elementwise=True, curved=False)
def clamp(op: Operation) -> Any:
    """Bounds are tensors; slope 1 in whichever of the three is selected, the upper bound where the two are crossed."""
    x = op.input(0, "self")
    low = op.input(1, "min") if op.has("min") else None
    high = op.input(len(op.needs) - 1, "max") if op.has("max") else None
    below = None if low is None else x < low if high is None else (x < low) & (low < high)
    above = None if high is None else x > high if low is None else (x > high) | (low > high)
    inside = between(x, low, high)
    return ((inside, above) if op.name == "ClampMaxBackward1" else (inside, below, above)), {}
