"""Functions of one tensor, entry by entry: ``h_x = f'(x)^2 h + f''(x) g``.

Most rows of this file are ``unary(name, saved, f', f'')``, the derivatives written in what the node saved: its input
(``self``) or its result. An ``f''`` of None says that it is zero wherever it exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value

Derivative = Callable[[Value], Value]


def unary(name: str, saved: str, first: Derivative, second: Derivative | None) -> None:
    """Registers ``y = f(x)`` by ``f'`` and ``f''``, functions of the node's ``"self"`` (x) or ``"result"`` (y)."""

    def rule(op: Operation) -> Any:
        x = op.output(saved) if saved == "result" else op.input(0, saved)
        return first(x), None if second is None else second(x)

    register_rule(name, elementwise=True, curved=second is not None)(rule)


# Masks let NaN through where torch's gradients do: ``~(x <= 0)`` rather than ``x > 0``.

# -- activations -----------------------------------------------------------------------------------------------------

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


@register_rule("SiluBackward0", elementwise=True)
def silu(op: Operation) -> Any:
    """With ``s = sigmoid(x)`` and ``s' = s (1 - s)``: ``s + x s'`` and ``s' (2 + x (1 - 2 s))``."""
    x = op.input(0, "self")
    s = x.sigmoid()
    slope = s * (1 - s)
    return s + x * slope, slope * (2 + x * (1 - 2 * s))


@register_rule("MishBackward0", elementwise=True)
def mish(op: Operation) -> Any:
    """``x t``, ``t = tanh(softplus(x))``, ``t' = s (1 - t^2)``: ``t + x t'`` and ``t' (2 + x (1 - s - 2 s t))``."""
    x = op.input(0, "self")
    t, s = torch.nn.functional.softplus(x).tanh(), x.sigmoid()
    slope = s * (1 - t * t)
    return t + x * slope, slope * (2 + x * (1 - s - 2 * s * t))


@register_rule("LogSigmoidBackward0", elementwise=True)
def log_sigmoid(op: Operation) -> Any:
    """With ``s = sigmoid(-x)``: ``s`` and ``-s (1 - s)``."""
    s = torch.sigmoid(-op.input(0, "self"))
    return s, s * s - s


@register_rule("GeluBackward0", elementwise=True)
def gelu(op: Operation) -> Any:
    """``x Phi(x)``: ``f' = Phi + x phi``, ``f'' = (2 - x^2) phi``; or the tanh form, with ``tanh(c (x + a x^3))``."""
    x = op.input(0, "self")
    square = x * x
    if op.number("approximate") == "none":
        density = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density, (2 - square) * density
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * x * (1 + a * square))
    slope = c * (1 + 3 * a * square)
    decay = 1 - t * t
    return 0.5 * (1 + t + x * decay * slope), decay * (slope + 3 * a * c * square - x * t * slope * slope)


unary(
    "HardswishBackward0",
    "self",
    lambda x: ((2 * x + 3) / 6).where(~(x.abs() >= 3), (x >= 3).to(x.dtype)),
    lambda x: (x.abs() < 3).to(x.dtype) / 3,
)
unary("HardsigmoidBackward0", "self", lambda x: (x.abs() < 3).to(x.dtype) / 6, None)


def _input_or_result(op: Operation) -> Value:
    """The input, or the result where the operation was done in place."""
    return op.output("result") if op.has("result") else op.input(0, "self")


def _two_slopes(x: Value, below: float) -> Value:
    """1 above zero."""
    return torch.full_like(x, below).masked_fill(x > 0, 1.0)


@register_rule("LeakyReluBackward0", "LeakyReluBackward1", elementwise=True, curved=False)
def leaky_relu(op: Operation) -> Any:
    """Slope 1 above zero and ``negative_slope`` below."""
    return _two_slopes(_input_or_result(op), op.number("negative_slope")), None


@register_rule("RreluWithNoiseBackward0", "RreluWithNoiseBackward1", elementwise=True, curved=False)
def rrelu(op: Operation) -> Any:
    """The slopes that were drawn, or outside training 1 above zero and ``(lower + upper) / 2`` below."""
    if op.number("training"):
        return op.tensor("noise"), None
    return _two_slopes(_input_or_result(op), (op.number("lower") + op.number("upper")) / 2), None


def _elu(op: Operation, alpha: float, scale: float, input_scale: float) -> Any:
    x = _input_or_result(op)
    below = x + scale * alpha if op.has("result") else scale * alpha * torch.exp(input_scale * x.clamp(max=0))
    positive = x > 0
    return (below * input_scale).masked_fill(positive, scale), (below * input_scale**2).masked_fill(positive, 0)


@register_rule("EluBackward0", "EluBackward1", elementwise=True)
def elu(op: Operation) -> Any:
    """Above zero ``c``; below ``c alpha k e^(k x)`` and ``c alpha k^2 e^(k x)``, ``c`` the scale, ``k`` the input's."""
    return _elu(op, op.number("alpha"), float(op.number("scale")), float(op.number("input_scale")))


@register_rule("CeluBackward0", "CeluBackward1", elementwise=True)
def celu(op: Operation) -> Any:
    """Above zero 1; below ``e^(x / alpha)`` and ``e^(x / alpha) / alpha``."""
    alpha = op.number("alpha")
    return _elu(op, alpha, 1.0, 1.0 / alpha)


@register_rule("SoftplusBackward0", elementwise=True)
def softplus(op: Operation) -> Any:
    """``s = sigmoid(beta x)`` and ``beta s (1 - s)`` below the threshold, 1 and 0 above."""
    beta = float(op.number("beta"))
    x = op.input(0, "self") * beta
    s, linear = torch.sigmoid(x), x > op.number("threshold")
    return s.masked_fill(linear, 1), (beta * s * (1 - s)).masked_fill(linear, 0)


@register_rule("HardtanhBackward0", elementwise=True, curved=False)
def hardtanh(op: Operation) -> Any:
    """Slope 1 between the bounds."""
    x = op.input(0, "self")
    return ~((x <= op.number("min_val")) | (x >= op.number("max_val"))), None


@register_rule("ThresholdBackward0", "ThresholdBackward1", elementwise=True, curved=False)
def threshold(op: Operation) -> Any:
    """Slope 1 above the threshold."""
    return ~(op.input(0, "self") <= op.number("threshold")), None


@register_rule("HardshrinkBackward0", "SoftshrinkBackward0", elementwise=True, curved=False)
def shrink(op: Operation) -> Any:
    """Slope 1 beyond ``lambd`` on both sides of zero."""
    return ~(op.input(0, "self").abs() <= op.number("lambd")), None


@register_rule("PreluKernelBackward0", elementwise=True, curved=False)
def prelu(op: Operation) -> Any:
    """``x`` above zero, ``w x`` below."""
    x, w = op.input(0, "self"), op.input(1, "weight")
    below = x <= 0
    return (torch.where(below, w, 1.0), x.where(below, 0.0)), {(0, 1): below.to(x.dtype)}


@register_rule("GluBackward0")
def glu(op: Operation, g: Value, h: Value) -> Value:
    """``a sigmoid(b)`` of the two halves of x: ``s^2 h`` and ``(a s')^2 h + a s'' g``."""
    x, dim = op.input(0, "self"), op.number("dim")
    half = op.input_shape(0)[dim] // 2
    a, s = x.narrow(dim, 0, half), torch.sigmoid(x.narrow(dim, half, half))
    slope = a * s * (1 - s)
    h_a, h_b = s * s * h, slope * (slope * h + (1 - 2 * s) * g)
    if h_b is ZERO:
        return ZERO
    return torch.cat([torch.zeros_like(a) if h_a is ZERO else h_a, h_b], dim)


# -- clamping --------------------------------------------------------------------------------------------------------


def _gradient_at_bound() -> bool:
    """Whether this version of torch lets the gradient through at a clamp's bound."""
    with torch.enable_grad():
        x = torch.ones((), requires_grad=True)
        return bool(torch.autograd.grad(x.clamp(max=1.0), x)[0])


_INCLUSIVE = _gradient_at_bound()


def between(x: Value, low: Value | None, high: Value | None) -> Value:
    """Where clamping lets the gradient through; one of the bounds may be missing."""
    above = None if low is None else x >= low if _INCLUSIVE else x > low
    below = None if high is None else x <= high if _INCLUSIVE else x < high
    return below if above is None else above if below is None else above & below


@register_rule("ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", elementwise=True, curved=False)
def clamp(op: Operation) -> Any:
    """Bounds are numbers."""
    low, high = (op.operand(name) if op.has(name) else None for name in ("min", "max"))
    return between(op.input(0, "self"), low, high), None


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


@register_rule("NegBackward0", elementwise=True, curved=False)
def neg(op: Operation) -> Any:
    """Slope -1."""
    return -1.0, None


@register_rule(
    "RoundBackward0", "RoundBackward1", "FloorBackward0", "CeilBackward0", "TruncBackward0", "SignBackward0",
    elementwise=True, curved=False,
)  # fmt: skip
def flat(op: Operation) -> Any:
    """Zero slope."""
    return 0.0, None


@register_rule("LogitBackward0", elementwise=True)
def logit(op: Operation) -> Any:
    """``1 / (x (1 - x))`` and ``(2 x - 1) / (x (1 - x))^2``, zero where ``eps`` clamps."""
    x, eps = op.input(0, "self"), op.number("eps")
    first = 1 / (x * (1 - x))
    if eps is not None:
        first = first.masked_fill((x < eps) | (x > 1 - eps), 0)
    return first, first * first * (2 * x - 1)


@register_rule("PowBackward0", elementwise=True, curved=lambda op: op.number("exponent") not in (0, 1))
def pow_scalar(op: Operation) -> Any:
    """``x^n``: ``n x^(n-1)`` and ``n (n-1) x^(n-2)``."""
    x, n = op.input(0, "self"), float(op.number("exponent"))
    if n in (0.0, 1.0):
        return n, None
    if n == 2.0:
        return 2 * x, 2.0
    return n * x ** (n - 1), n * (n - 1) * x ** (n - 2)
