"""Convolutions: bilinear, so the squared Jacobian is the same convolution with the other operand squared.

With ``y = x * w + b``, one call of the convolution's own backward on squared operands yields all three diagonals:
``h_x`` is h convolved back with ``w^2``, ``h_w`` correlates h with ``x^2``, ``h_b`` sums h. There is no second
derivative in one operand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value

_convolution_backward = torch.ops.aten.convolution_backward.default
_conv_tbc_backward = torch.ops.aten.conv_tbc_backward.default


@register_rule("ConvolutionBackward0", "ConvolutionBackward1", bilinear=True)
def convolution(op: Operation, h: Value) -> Sequence[Value]:
    """Any number of dimensions, strided, padded, dilated, grouped and transposed."""
    names = "bias_sym_sizes_opt", "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    return _of_operands(op, h, "input", *[op.number(name) for name in names])


@register_rule(
    "MkldnnConvolutionBackward0", "SlowConv2DBackward0", "SlowConv3DBackward0", "SlowConvDilated2DBackward0",
    "SlowConvDilated3DBackward0", "SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0", bilinear=True,
)  # fmt: skip
def convolution_of_one_backend(op: Operation, h: Value) -> Sequence[Value]:
    """Kernels called by their own names, which have saved only the settings they know."""
    stride, padding = op.number("stride"), op.number("padding")
    dilation = op.number("dilation") if op.has("dilation") else (1,) * len(stride)
    transposed = op.has("output_padding")
    output_padding = op.number("output_padding") if transposed else (0,) * len(stride)
    groups = op.number("groups") if op.has("groups") else 1
    bias_shape = tuple(op.input_shape(2)) if op.need(2) else None
    return _of_operands(op, h, "self", bias_shape, stride, padding, dilation, transposed, output_padding, groups)


def _of_operands(op: Operation, h: Value, saved: str, *settings: object) -> Sequence[Value]:
    """The rule of a node that calls its input ``saved``; ``settings`` follow in the convolution's own backward."""
    x, w = op.input(0, saved), op.input(1, "weight")
    # Where a diagonal is not needed, the other operand only lends its shape.
    x_squared = (x * x if op.need(1) else x).to(h.dtype)
    w_squared = (w * w if op.need(0) else w).to(h.dtype)
    made = _convolution_backward(h, x_squared, w_squared, *settings, list(op.needs))
    return [made[i] if op.need(i) else None for i in range(3)]


@register_rule("ConvTbcBackward0", bilinear=True)
def conv_tbc(op: Operation, h: Value) -> Sequence[Value]:
    """A convolution of (time, batch, channel), always with bias."""
    x, w = op.input(0, "self"), op.input(1, "weight")
    made = _conv_tbc_backward(h, x * x, w * w, op.input(2, "bias"), op.number("pad"))
    return made[0], made[1], made[2]
