"""Convolutions: bilinear, so the squared Jacobian is the same convolution with the other operand squared.

With ``y = x * w + b``, one call of the convolution's own backward on squared operands yields all three diagonals:
``h_x`` is h convolved back with ``w^2``, ``h_w`` correlates h with ``x^2``, ``h_b`` sums h. There is no second
derivative in one operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_convolution_backward = torch.ops.aten.convolution_backward.default
_conv_tbc_backward = torch.ops.aten.conv_tbc_backward.default


@register_rule("ConvolutionBackward0", "ConvolutionBackward1", bilinear=True)
def convolution(op: Operation) -> Formula:
    """Any number of dimensions, strided, padded, dilated, grouped and transposed."""
    node = op.node
    return of_operands(
        op, node._saved_input, node._saved_weight, node._saved_bias_sym_sizes_opt, node._saved_stride,
        node._saved_padding, node._saved_dilation, node._saved_transposed, node._saved_output_padding,
        node._saved_groups,
    )  # fmt: skip


@register_rule(
    "MkldnnConvolutionBackward0", "SlowConv2DBackward0", "SlowConv3DBackward0", "SlowConvDilated2DBackward0",
    "SlowConvDilated3DBackward0", "SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0", bilinear=True,
)  # fmt: skip
def convolution_of_one_backend(op: Operation) -> Formula:
    """Kernels called by their own names, which have saved only the settings they know."""
    node = op.node
    plain = [1] * len(node._saved_stride)
    output_padding = getattr(node, "_saved_output_padding", None)
    bias_shape = op.input_shape(2) if op.needs[2] else None
    return of_operands(
        op, node._saved_self, node._saved_weight, bias_shape, node._saved_stride, node._saved_padding,
        getattr(node, "_saved_dilation", plain), output_padding is not None, output_padding or [0] * len(plain),
        getattr(node, "_saved_groups", 1),
    )  # fmt: skip


def of_operands(op: Operation, x: Tensor, w: Tensor, *settings: object) -> Formula:
    """The formula for input x and kernel w; ``settings`` are what the convolution's own backward takes after them."""
    needs = list(op.needs)
    need_x, need_w, _ = needs

    def formula(h: Tensor) -> Diagonals:
        # Where a diagonal is not needed, the other operand only lends its shape.
        x_squared = squared(x) if need_w else x.to(h.dtype)
        w_squared = squared(w) if need_x else w.to(h.dtype)
        diagonals: Diagonals = _convolution_backward(h, x_squared, w_squared, *settings, needs)
        return diagonals

    return formula


@register_rule("ConvTbcBackward0", bilinear=True)
def conv_tbc(op: Operation) -> Formula:
    """A convolution of (time, batch, channel), always with bias."""
    node = op.node
    x, w, b, pad = node._saved_self, node._saved_weight, node._saved_bias, node._saved_pad

    def formula(h: Tensor) -> Diagonals:
        diagonals: Diagonals = _conv_tbc_backward(h, squared(x), squared(w), b, pad)
        return diagonals

    return formula
