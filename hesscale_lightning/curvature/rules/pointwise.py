"""Functions of one tensor, entry by entry: ``h_x = f'(x)^2 h + f''(x) g``.

Most rows of this file are ``unary(name, saved tensor, f', f'')``, the derivatives written in what the node saved: its
input (``self``) or its result. An ``f''`` of None says that it is zero wherever it exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import elementwise
from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, Partials, register_rule
from hesscale_lightning.curvature.values import Value

Derivative = Callable[[Tensor], Tensor]


def unary(
    name: str,
    saved: str,
    first: Derivative,
    second: Derivative | None,
    formula: Callable[[Operation], Formula] | None = None,
) -> None:
    """Registers ``y = f(x)`` by ``f'`` and ``f''``, functions of the tensor that the node saved."""
    attribute = f"_saved_{saved}"

    def rule(op: Operation) -> Callable[[bool], Partials]:
        tensor = getattr(op.node, attribute)

        def partials(curved: bool) -> Partials:
            x = full(tensor)
            return (first(x),), {(0, 0): second(x)} if curved and second is not None else {}

        return partials

    elementwise(name, curved=second is not None, formula=formula)(rule)


# Masks let NaN through where torch's gradients do: ``~(x <= 0)`` rather than ``x > 0``.

# -- activations
# --------------------------------------------------------------------------------------------------------

_threshold_backward = torch.ops.aten.threshold_backward.default


def _relu(op: Operation) -> Any:
    """Slope 1 above zero."""
    return ~(op.output("result") <= 0), None


@register_rule("ReluBackward0", partials=_relu, curved=False)
def relu(op: Operation, h: Value) -> Value:
    """``h`` where ``y > 0``."""
    return _threshold_backward(h, op.output("result"), 0)


@register_rule("TanhBackward0", elementwise=True)
def tanh(op: Operation) -> Any:
    """With ``s = 1 - y^2``: ``s`` and ``-2 y s``."""
    y = op.output("result")
    s = 1 - y * y
    return s, -2 * y * s


@register_rule("SigmoidBackward0", elementwise=True)
def sigmoid(op: Operation) -> Any:
    """With ``s = y (1 - y)``: ``s`` and ``s (1 - 2 y)``."""
    y = op.output("result")
    s = y - y * y
    return s, s * (1 - 2 * y)


unary(
    "HardswishBackward0",
    "self",
    lambda x: ((2 * x + 3) / 6).where(~(x.abs() >= 3), (x >= 3).to(x.dtype)),
    lambda x: (x.abs() < 3).to(x.dtype) / 3,
)
unary("HardsigmoidBackward0", "self", lambda x: (x.abs() < 3).to(x.dtype) / 6, None)


def _silu_second(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _silu_first(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


unary("SiluBackward0", "self", _silu_first, _silu_second)


def _mish_first(x: Tensor) -> Tensor:
    t, s = torch.nn.functional.softplus(x).tanh(), x.sigmoid()
    return t + x * s * (1 - t * t)


def _mish_second(x: Tensor) -> Tensor:
    """``t' (2 + x (1 - s) - 2 x s t)`` with ``t = tanh(softplus(x))``, ``t' = s (1 - t^2)``."""
    t, s = torch.nn.functional.softplus(x).tanh(), x.sigmoid()
    return s * (1 - t * t) * (2 + x * (1 - s) - 2 * x * s * t)


unary("MishBackward0", "self", _mish_first, _mish_second)


def _log_sigmoid_second(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return -s * (1 - s)


unary("LogSigmoidBackward0", "self", lambda x: torch.sigmoid(-x), _log_sigmoid_second)


@elementwise("GeluBackward0")
def gelu(op: Operation) -> Callable[[bool], Partials]:
    """``x Phi(x)``: ``f' = Phi + x phi``, ``f'' = (2 - x^2) phi``; or the tanh form, with ``tanh(c (x + a x^3))``."""
    saved, form = op.node._saved_self, op.node._saved_approximate

    def exact(curved: bool) -> Partials:
        x = full(saved)
        density = torch.exp(-0.5 * x * x).mul_(1 / math.sqrt(2 * math.pi))
        first = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5).addcmul_(x, density)
        return (first,), {(0, 0): torch.addcmul(2 * density, x * x, density, value=-1)} if curved else {}

    def tanh(curved: bool) -> Partials:
        x = full(saved)
        c, a = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        t = torch.tanh(c * x * (1 + a * square))
        slope = c * (1 + 3 * a * square)
        decay = 1 - t * t
        first = 0.5 * (1 + t) + 0.5 * x * decay * slope
        if not curved:
            return (first,), {}
        return (first,), {(0, 0): decay * (slope + 3 * a * c * square - x * t * slope * slope)}

    return exact if form == "none" else tanh


@elementwise("LeakyReluBackward0", curved=False)
def leaky_relu(op: Operation) -> Callable[[bool], Partials]:
    x, slope = op.node._saved_self, op.node._saved_negative_slope
    return lambda _: ((_two_slopes(full(x), 1.0, slope),), {})


@elementwise("LeakyReluBackward1", curved=False)
def leaky_relu_(op: Operation) -> Callable[[bool], Partials]:
    y, slope = op.node._saved_result, op.node._saved_negative_slope
    return lambda _: ((_two_slopes(full(y), 1.0, slope),), {})


def _two_slopes(x: Tensor, above: float, below: float) -> Tensor:
    return torch.full_like(x, below).masked_fill_(x > 0, above)


@elementwise("RreluWithNoiseBackward0", "RreluWithNoiseBackward1", curved=False)
def rrelu(op: Operation) -> Callable[[bool], Partials]:
    node = op.node
    x = node._saved_result if node.name() == "RreluWithNoiseBackward1" else node._saved_self
    noise = node._saved_noise
    if node._saved_training:
        return lambda _: ((full(noise),), {})
    slope = (node._saved_lower + node._saved_upper) / 2
    return lambda _: ((_two_slopes(full(x), 1.0, slope),), {})


def _elu(x_or_y: Tensor, is_result: bool, alpha: float, scale: float, input_scale: float, curved: bool) -> Partials:
    """Above zero ``c``; below ``c alpha k e^(k x)`` and ``c alpha k^2 e^(k x)``, ``c`` the scale, ``k`` the input's."""
    x = full(x_or_y)
    below = (x + scale * alpha) if is_result else scale * alpha * torch.exp(input_scale * x.clamp(max=0))
    positive = x > 0
    second = {(0, 0): (below * input_scale**2).masked_fill(positive, 0)} if curved else {}
    return ((below * input_scale).masked_fill(positive, scale),), second


@elementwise("EluBackward0", "EluBackward1")
def elu(op: Operation) -> Callable[[bool], Partials]:
    node = op.node
    is_result = node.name() == "EluBackward1"  # the in-place form
    saved = node._saved_result if is_result else node._saved_self
    alpha, scale, input_scale = node._saved_alpha, node._saved_scale, node._saved_input_scale
    return lambda curved: _elu(saved, is_result, alpha, scale, input_scale, curved)


@elementwise("CeluBackward0", "CeluBackward1")
def celu(op: Operation) -> Callable[[bool], Partials]:
    node = op.node
    is_result = node.name() == "CeluBackward1"
    saved, alpha = node._saved_result if is_result else node._saved_self, node._saved_alpha
    return lambda curved: _elu(saved, is_result, alpha, 1.0, 1.0 / alpha, curved)


@elementwise("SoftplusBackward0")
def softplus(op: Operation) -> Callable[[bool], Partials]:
    """``s = sigmoid(beta x)`` and ``beta s (1 - s)`` below the threshold, 1 and 0 above."""
    saved, beta, threshold = op.node._saved_self, op.node._saved_beta, op.node._saved_threshold

    def partials(curved: bool) -> Partials:
        x = full(saved) * beta
        s = torch.sigmoid(x)
        linear = x > threshold
        second = {(0, 0): (beta * s * (1 - s)).masked_fill(linear, 0)} if curved else {}
        return (s.masked_fill(linear, 1),), second

    return partials


@elementwise("HardtanhBackward0", curved=False)
def hardtanh(op: Operation) -> Callable[[bool], Partials]:
    x, low, high = op.node._saved_self, op.node._saved_min_val, op.node._saved_max_val
    return lambda _: ((~((x <= low) | (x >= high)),), {})


@elementwise("ThresholdBackward0", "ThresholdBackward1", curved=False)
def threshold(op: Operation) -> Callable[[bool], Partials]:
    x, bound = op.node._saved_self, op.node._saved_threshold
    return lambda _: ((~(x <= bound),), {})


@elementwise("HardshrinkBackward0", "SoftshrinkBackward0", curved=False)
def shrink(op: Operation) -> Callable[[bool], Partials]:
    x, bound = op.node._saved_self, op.node._saved_lambd
    return lambda _: ((~(x.abs() <= bound),), {})


@elementwise("PreluKernelBackward0", curved=False)
def prelu(op: Operation) -> Callable[[bool], Partials]:
    """``x`` above zero, ``w x`` below."""
    x, w = op.node._saved_self, op.node._saved_weight

    def partials(_: bool) -> Partials:
        below = x <= 0
        by_x = torch.where(below, full(w), 1.0)
        return (by_x, full(x).where(below, 0.0)), {(0, 1): below.to(by_x.dtype)}

    return partials


@register_rule("GluBackward0", curved=True)
def glu(op: Operation) -> Formula:
    """``a sigmoid(b)`` of the two halves of x: ``s^2 h`` and ``(a s')^2 h + a s'' g``."""
    saved, dim = op.node._saved_self, op.node._saved_dim
    dim = dim - 2**64 if dim >= 2**63 else dim

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        a, b = full(saved).chunk(2, dim)
        s = torch.sigmoid(b)
        slope = s * (1 - s)
        h_a, h_b = (torch.zeros_like(a),) * 2
        if h is not None:
            h_a, h_b = s.square() * h, (a * slope).square() * h
        if g is not None:
            h_b = h_b + a * slope * (1 - 2 * s) * g
        return (torch.cat([h_a, h_b], dim),)

    return formula


# -- clamping --------------------------------------------------------------------------------------------------------


def _gradient_at_bound() -> bool:
    """Whether this version of torch lets the gradient through at a clamp's bound."""
    with torch.enable_grad():
        x = torch.ones((), requires_grad=True)
        return bool(torch.autograd.grad(x.clamp(max=1.0), x)[0])


_INCLUSIVE = _gradient_at_bound()


def between(x: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> Tensor:
    """Where clamping lets the gradient through."""
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x >= low if _INCLUSIVE else x > low)
    if high is not None:
        inside = inside & (x <= high if _INCLUSIVE else x < high)
    return inside


@elementwise("ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", curved=False)
def clamp(op: Operation) -> Callable[[bool], Partials]:
    """Bounds are numbers."""
    x = op.node._saved_self
    low, high = getattr(op.node, "_saved_min", None), getattr(op.node, "_saved_max", None)
    return lambda _: ((between(x, low, high),), {})


# -- elementary functions --------------------------------------------------------------------------------------------

unary("ExpBackward0", "result", lambda y: y, lambda y: y)
unary("Exp2Backward0", "result", lambda y: y * math.log(2), lambda y: y * math.log(2) ** 2)
unary("Expm1Backward0", "result", lambda y: y + 1, lambda y: y + 1)
unary("LogBackward0", "self", lambda x: 1 / x, lambda x: -1 / (x * x))
unary("Log2Backward0", "self", lambda x: 1 / (x * math.log(2)), lambda x: -1 / (x * x * math.log(2)))
unary("Log10Backward0", "self", lambda x: 1 / (x * math.log(10)), lambda x: -1 / (x * x * math.log(10)))
unary("Log1PBackward0", "self", lambda x: 1 / (1 + x), lambda x: -1 / (1 + x).square())
unary("SqrtBackward0", "result", lambda y: 0.5 / y, lambda y: -0.25 / (y * y * y))
unary("RsqrtBackward0", "result", lambda y: -0.5 * y**3, lambda y: 0.75 * y**5)
unary("ReciprocalBackward0", "result", lambda y: -y * y, lambda y: 2 * y**3)
unary("SinBackward0", "self", torch.cos, lambda x: -x.sin())
unary("CosBackward0", "self", lambda x: -x.sin(), lambda x: -x.cos())
unary("TanBackward0", "result", lambda y: 1 + y * y, lambda y: 2 * y * (1 + y * y))
unary("AsinBackward0", "self", lambda x: (1 - x * x).rsqrt(), lambda x: x * (1 - x * x).rsqrt() ** 3)
unary("AcosBackward0", "self", lambda x: -(1 - x * x).rsqrt(), lambda x: -x * (1 - x * x).rsqrt() ** 3)
unary("AtanBackward0", "self", lambda x: 1 / (1 + x * x), lambda x: -2 * x / (1 + x * x).square())
unary("SinhBackward0", "self", torch.cosh, torch.sinh)
unary("CoshBackward0", "self", torch.sinh, torch.cosh)
unary("AsinhBackward0", "self", lambda x: (1 + x * x).rsqrt(), lambda x: -x * (1 + x * x).rsqrt() ** 3)
unary("AcoshBackward0", "self", lambda x: (x * x - 1).rsqrt(), lambda x: -x * (x * x - 1).rsqrt() ** 3)
unary("AtanhBackward0", "self", lambda x: 1 / (1 - x * x), lambda x: 2 * x / (1 - x * x).square())
unary(
    "ErfBackward0",
    "self",
    lambda x: torch.exp(-x * x) * (2 / math.sqrt(math.pi)),
    lambda x: x * torch.exp(-x * x) * (-4 / math.sqrt(math.pi)),
)
unary(
    "ErfcBackward0",
    "self",
    lambda x: torch.exp(-x * x) * (-2 / math.sqrt(math.pi)),
    lambda x: x * torch.exp(-x * x) * (4 / math.sqrt(math.pi)),
)
unary("LgammaBackward0", "self", torch.digamma, lambda x: torch.polygamma(1, x))
unary("DigammaBackward0", "self", lambda x: torch.polygamma(1, x), lambda x: torch.polygamma(2, x))
unary("AbsBackward0", "self", torch.sgn, None)


@elementwise("NegBackward0", curved=False, formula=lambda op: lambda h: (h,))
def neg(op: Operation) -> Callable[[bool], Partials]:
    return lambda _: ((-1.0,), {})


@elementwise(
    "RoundBackward0",
    "RoundBackward1",
    "FloorBackward0",
    "CeilBackward0",
    "TruncBackward0",
    "SignBackward0",
    curved=False,
)
def flat(op: Operation) -> Callable[[bool], Partials]:
    """Zero slope."""
    return lambda _: ((0.0,), {})


@elementwise("LogitBackward0")
def logit(op: Operation) -> Callable[[bool], Partials]:
    """``1 / (x (1 - x))`` and ``(2 x - 1) / (x (1 - x))^2``, zero where ``eps`` clamps."""
    saved, eps = op.node._saved_self, op.node._saved_eps

    def partials(curved: bool) -> Partials:
        x = full(saved)
        first = 1 / (x * (1 - x))
        second = first * first * (2 * x - 1)
        if eps is not None:
            outside = (x < eps) | (x > 1 - eps)
            first, second = first.masked_fill(outside, 0), second.masked_fill(outside, 0)
        return (first,), {(0, 0): second}

    return partials


@elementwise("PowBackward0")
def pow_scalar(op: Operation) -> Callable[[bool], Partials]:
    """``x^n``: ``n x^(n-1)`` and ``n (n-1) x^(n-2)``."""
    saved, n = op.node._saved_self, float(op.node._saved_exponent)
    if n in (0.0, 1.0):
        op.curved = False
        return lambda _: ((n,), {})

    def partials(curved: bool) -> Partials:
        x = full(saved)
        first = 2 * x if n == 2 else n * x ** (n - 1)
        return (first,), {(0, 0): 2.0 if n == 2 else n * (n - 1) * x ** (n - 2)} if curved else {}

    return partials
