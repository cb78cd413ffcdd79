"""Sums, products and other elementwise functions of several tensors, with broadcasting.

Each is given by its partials (see :mod:`hesscale_lightning.curvature.elementwise`): first derivatives by each input,
second derivatives by pairs. Mixed ones play no part for the operation alone; they carry the cross terms where its
inputs come from one tensor, as in ``x * x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import elementwise
from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, Partials
from hesscale_lightning.curvature.rules.pointwise import between

PartialsFunction = Callable[[bool], Partials]


def _sum(op: Operation) -> Formula:
    """``a + alpha b``: curvature passes unchanged to ``a`` and times ``alpha^2`` to ``b``."""
    square = float(getattr(op.node, "_saved_alpha", 1)) ** 2
    shape = op.output_shape()
    reduce = [need and op.input_shape(i) != shape for i, need in enumerate(op.needs)]
    if square == 1 and True not in reduce:
        return lambda h: (h,) * len(reduce)
    shapes = [op.input_shape(i) if needed else None for i, needed in enumerate(reduce)]

    def formula(h: Tensor) -> Diagonals:
        scaled = (h, h if square == 1 else h * square)
        return [x if s is None else x.sum_to_size(s) for x, s in zip(scaled, shapes, strict=False)]

    return formula


@elementwise("AddBackward0", "AddBackward1", curved=False, formula=_sum)
def add(op: Operation) -> PartialsFunction:
    alpha = float(getattr(op.node, "_saved_alpha", 1))
    return lambda _: ((1.0, alpha), {})


@elementwise("SubBackward0", "SubBackward1", curved=False, formula=_sum)
def sub(op: Operation) -> PartialsFunction:
    alpha = float(getattr(op.node, "_saved_alpha", 1))
    return lambda _: ((1.0, -alpha), {})


@elementwise("RsubBackward0", "RsubBackward1", curved=False)
def rsub(op: Operation) -> PartialsFunction:
    """``b - alpha a``."""
    alpha = float(op.node._saved_alpha)
    return lambda _: ((-alpha, 1.0), {})


def _operand(x: Tensor | float | None) -> Any:
    """A saved operand: a number, which torch saves as a tensor on the CPU, is a number again."""
    if not isinstance(x, Tensor):
        return x
    if x.dim() == 0 and x.device.type == "cpu" and not x.requires_grad:
        return float(x)
    return full(x)


@elementwise("MulBackward0", "MulBackward1", curved=False)
def mul(op: Operation) -> PartialsFunction:
    a, b = getattr(op.node, "_saved_self", None), op.node._saved_other  # None where the other needs no gradient
    return lambda _: ((_operand(b), _operand(a)), {(0, 1): 1.0})


@elementwise("DivBackward0", "DivBackward1")
def div(op: Operation) -> PartialsFunction:
    """``a / b``: ``1/b``, ``-a/b^2``; ``f_ab = -1/b^2``, ``f_bb = 2 a/b^3``."""
    a, b = getattr(op.node, "_saved_self", None), op.node._saved_other
    by_divisor = len(op.needs) > 1 and op.needs[1]
    op.curved = by_divisor

    def partials(curved: bool) -> Partials:
        inverse: Any = 1 / _operand(b)
        if not by_divisor:
            return (inverse,), {}
        slope = -inverse * inverse
        bend = _operand(a) * slope
        return (inverse, bend), {(0, 1): slope, (1, 1): -2 * bend * inverse} if curved else {}

    return partials


@elementwise("PowBackward1")
def pow_tensor(op: Operation) -> PartialsFunction:
    """``y = x^p``: ``f_xx = p (p-1) x^(p-2)``, ``f_xp = x^(p-1) (1 + p ln x)``, ``f_pp = y ln^2 x``."""
    saved, exponent, result = op.node._saved_self, op.node._saved_exponent, op.node._saved_result

    def partials(curved: bool) -> Partials:
        x, p, y = full(saved), full(exponent), full(result)
        log = torch.where((x == 0) & (p >= 0), 0.0, x.log()) if op.needs[1] else torch.zeros_like(x)
        by_x = torch.where(p == 0, 0.0, p * x ** (p - 1))
        second = {
            (0, 0): torch.where((p == 0) | (p == 1), 0.0, p * (p - 1) * x ** (p - 2)),
            (0, 1): x ** (p - 1) * (1 + p * log),
            (1, 1): y * log * log,
        }
        return (by_x, y * log), second if curved else {}

    return partials


@elementwise("PowBackward2")
def pow_base(op: Operation) -> PartialsFunction:
    """``c^p`` with a number ``c``."""
    base, result = op.node._saved_self, op.node._saved_result

    def partials(curved: bool) -> Partials:
        y = full(result)
        log = torch.as_tensor(base, dtype=y.dtype, device=y.device).log()
        return (y * log,), {(0, 0): y * log * log}

    return partials


@elementwise("AddcmulBackward0", curved=False)
def addcmul(op: Operation) -> PartialsFunction:
    """``c + value a b``."""
    a, b, value = op.node._saved_tensor1, op.node._saved_tensor2, float(op.node._saved_value)
    return lambda _: (
        (1.0, None if b is None else full(b) * value, None if a is None else full(a) * value),
        {(1, 2): value},
    )


@elementwise("AddcdivBackward0")
def addcdiv(op: Operation) -> PartialsFunction:
    """``c + value a / b``."""
    a, b, value = op.node._saved_tensor1, op.node._saved_tensor2, float(op.node._saved_value)
    op.curved = op.needs[2]

    def partials(curved: bool) -> Partials:
        if b is None:
            return (1.0, None, None), {}
        inverse = 1 / full(b)
        if not op.needs[2]:
            return (1.0, value * inverse, None), {}
        slope = -value * inverse * inverse
        return (1.0, value * inverse, full(a) * slope), {(1, 2): slope, (2, 2): -2 * full(a) * slope * inverse}

    return partials


@elementwise("LerpBackward0", curved=False)
def lerp_number(op: Operation) -> PartialsFunction:
    """``(1 - w) a + w b`` with a number ``w``."""
    weight = float(op.node._saved_weight)
    return lambda _: ((1 - weight, weight), {})


@elementwise("LerpBackward1", curved=False)
def lerp_tensor(op: Operation) -> PartialsFunction:
    """``a + w (b - a)``."""
    node = op.node
    a, b, w = node._saved_self, node._saved_end, node._saved_weight

    def partials(_: bool) -> Partials:
        weight = full(w) if w is not None else None
        by_weight = full(b) - full(a) if op.needs[2] else None
        by_ends = (None, None) if weight is None else (1 - weight, weight)
        return (*by_ends, by_weight), {(0, 2): -1.0, (1, 2): 1.0}

    return partials


@elementwise("MaximumBackward0", "MinimumBackward0", curved=False)
def extremum(op: Operation) -> PartialsFunction:
    """The selected input has slope 1; on a tie torch gives each of the two 1/2."""
    a, b, name = op.node._saved_self, op.node._saved_other, op.node.name()

    def partials(_: bool) -> Partials:
        less, more = (a < b, a > b) if name == "MaximumBackward0" else (a > b, a < b)
        half = (a == b).to(full(a).dtype).mul_(0.5)
        return ((1 - half).masked_fill_(less, 0), (1 - half).masked_fill_(more, 0)), {}

    return partials


@elementwise("FmaxBackward0", "FminBackward0", curved=False)
def extremum_ignoring_nan(op: Operation) -> PartialsFunction:
    a, b, name = op.node._saved_self, op.node._saved_other, op.node.name()

    def partials(_: bool) -> Partials:
        first = ((a >= b) if name == "FmaxBackward0" else (a <= b)) | b.isnan()
        return (first, ~first), {}

    return partials


@elementwise("Atan2Backward0")
def atan2(op: Operation) -> PartialsFunction:
    """With ``r = a^2 + b^2``: ``b/r``, ``-a/r``; ``f_aa = -2 a b/r^2 = -f_bb``, ``f_ab = (a^2 - b^2)/r^2``."""
    saved_a, saved_b = op.node._saved_self, op.node._saved_other

    def partials(_: bool) -> Partials:
        a, b = full(saved_a), full(saved_b)
        inverse = 1 / (a * a + b * b)
        bend = -2 * a * b * inverse * inverse
        second = {(0, 0): bend, (0, 1): (a * a - b * b) * inverse * inverse, (1, 1): -bend}
        return (b * inverse, -a * inverse), second

    return partials


@elementwise("HypotBackward0")
def hypot(op: Operation) -> PartialsFunction:
    """``y = sqrt(a^2 + b^2)``: ``a/y``, ``b/y``; ``f_aa = b^2/y^3``, ``f_ab = -a b/y^3``, ``f_bb = a^2/y^3``."""
    saved_a, saved_b, result = op.node._saved_self, op.node._saved_other, op.node._saved_result

    def partials(_: bool) -> Partials:
        a, b, y = full(saved_a), full(saved_b), full(result)
        cubed = 1 / y**3
        return (a / y, b / y), {(0, 0): b * b * cubed, (0, 1): -a * b * cubed, (1, 1): a * a * cubed}

    return partials


@elementwise("LogaddexpBackward0")
def logaddexp(op: Operation) -> PartialsFunction:
    """With ``s = sigmoid(a - b)``: ``s``, ``1 - s``; ``f_aa = f_bb = s (1 - s) = -f_ab``."""
    saved_a, saved_b = op.node._saved_self, op.node._saved_other

    def partials(_: bool) -> Partials:
        share = torch.sigmoid(full(saved_a) - full(saved_b))
        bend = share * (1 - share)
        return (share, 1 - share), {(0, 0): bend, (0, 1): -bend, (1, 1): bend}

    return partials


@elementwise("XlogyBackward0")
def xlogy(op: Operation) -> PartialsFunction:
    """``x log y``: ``log y``, ``x/y``; ``f_xy = 1/y``, ``f_yy = -x/y^2``."""
    saved_x, saved_y = op.node._saved_self, op.node._saved_other
    op.curved = op.needs[1]

    def partials(_: bool) -> Partials:
        y = full(saved_y)
        x = full(saved_x)
        by_x = torch.xlogy(torch.ones_like(y), y).masked_fill((x == 0) & (y <= 0), 0)
        return (by_x, x / y), {(0, 1): 1 / y, (1, 1): -x / (y * y)}

    return partials


@elementwise("XlogyBackward1")
def xlogy_number_first(op: Operation) -> PartialsFunction:
    x, saved = float(op.node._saved_self), op.node._saved_other

    def partials(_: bool) -> Partials:
        y = full(saved)
        return (x / y,), {(0, 0): -x / (y * y)}

    return partials


@elementwise("XlogyBackward2", curved=False)
def xlogy_number_last(op: Operation) -> PartialsFunction:
    slope = float(torch.tensor(op.node._saved_other, dtype=torch.float64).log())
    return lambda _: ((slope,), {})


@elementwise("DivBackward2", "DivBackward3")
def div_rounded(op: Operation) -> PartialsFunction:
    """Flat if the quotient is rounded."""
    if op.node._saved_rounding_mode is None:
        return div(op)
    op.curved, inputs = False, len(op.needs)
    return lambda _: ((0.0, 0.0)[:inputs], {})


@elementwise("ClampBackward0", "ClampMinBackward1", "ClampMaxBackward1", curved=False)
def clamp(op: Operation) -> PartialsFunction:
    """Bounds are tensors; slope 1 in whichever of the three is selected, the upper bound where the two are crossed."""
    node = op.node
    x, low, high = node._saved_self, getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    by_max_only = node.name() == "ClampMaxBackward1"

    def partials(_: bool) -> Partials:
        inside = between(x, low, high)
        below = None if low is None else x < low if high is None else (x < low) & (low < high)
        above = None if high is None else x > high if low is None else (x > high) | (low > high)
        return (inside, above) if by_max_only else (inside, below, above), {}

    return partials
