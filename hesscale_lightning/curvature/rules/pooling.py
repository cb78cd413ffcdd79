"""Pooling and resampling of the last one to three dimensions.

All are linear in each region, ``y_j = sum_i c_ji x_i``, so ``h_x = sum_j c_ji^2 h_j``. A maximum selects (c is 0 or 1).
An average has one coefficient for each window, ``c_j``; its backward multiplies by c once, so it is given ``c_j h_j``.
Interpolation has coefficients that are products of one factor for each axis, and so are their squares.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import by_node, with_stand_in

_aten = torch.ops.aten

# -- selecting -------------------------------------------------------------------------------------------------------

_max_pool_backward = {
    "MaxPool2DWithIndicesBackward0": _aten.max_pool2d_with_indices_backward.default,
    "MaxPool3DWithIndicesBackward0": _aten.max_pool3d_with_indices_backward.default,
}
_adaptive_max_pool_backward = {
    "AdaptiveMaxPool2DBackward0": _aten.adaptive_max_pool2d_backward.default,
    "AdaptiveMaxPool3DBackward0": _aten.adaptive_max_pool3d_backward.default,
}
_fractional_max_pool_backward = {
    "FractionalMaxPool2DBackward0": _aten.fractional_max_pool2d_backward.default,
    "FractionalMaxPool3DBackward0": _aten.fractional_max_pool3d_backward.default,
}


@register_rule(*_max_pool_backward)
def max_pool(op: Operation) -> Formula:
    """``y_j = x[index_j]``."""
    node = op.node
    settings = (
        node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_ceil_mode,
        node._saved_result1,
    )  # fmt: skip
    return with_stand_in(_max_pool_backward[node.name()], node._saved_self, *settings)


@register_rule(*_adaptive_max_pool_backward)
def adaptive_max_pool(op: Operation) -> Formula:
    """``y_j = x[index_j]``."""
    return with_stand_in(_adaptive_max_pool_backward[op.node.name()], op.node._saved_self, op.node._saved_result1)


@register_rule(*_fractional_max_pool_backward)
def fractional_max_pool(op: Operation) -> Formula:
    """``y_j = x[index_j]``."""
    node = op.node
    settings = node._saved_kernel_size, node._saved_output_size, node._saved_result1
    return with_stand_in(_fractional_max_pool_backward[node.name()], node._saved_self, *settings)


@register_rule("MaxUnpool2DBackward0", "MaxUnpool3DBackward0")
def max_unpool(op: Operation) -> Formula:
    """``y[index_j] = x_j``."""
    dims = 2 if op.node.name() == "MaxUnpool2DBackward0" else 3
    indices = op.node._saved_indices
    return lambda h: (h.flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape),)


register_rule(
    "UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0", "UpsampleNearest3DBackward0",
    "UpsampleNearestExact1DBackward0", "UpsampleNearestExact2DBackward0", "UpsampleNearestExact3DBackward0",
)(by_node)  # fmt: skip


# -- averaging -------------------------------------------------------------------------------------------------------

_avg_pool = {
    "AvgPool2DBackward0": (2, F.avg_pool2d, _aten.avg_pool2d_backward.default),
    "AvgPool3DBackward0": (3, F.avg_pool3d, _aten.avg_pool3d_backward.default),
}
_adaptive_avg_pool_backward = {
    "AdaptiveAvgPool2DBackward0": (2, _aten._adaptive_avg_pool2d_backward.default),
    "AdaptiveAvgPool3DBackward0": (3, _aten._adaptive_avg_pool3d_backward.default),
}


@register_rule(*_avg_pool)
def avg_pool(op: Operation) -> Formula:
    """``c = 1/divisor``: the same for all windows, except where windows are cut off at an edge."""
    node = op.node
    dims, pool, backward = _avg_pool[node.name()]
    kernel, padding, divisor = node._saved_kernel_size, node._saved_padding, node._saved_divisor_override
    settings = kernel, node._saved_stride, padding, node._saved_ceil_mode, node._saved_count_include_pad
    x = node._saved_self
    shape, strides = x.shape, x.stride()
    if divisor is None and not node._saved_ceil_mode and (node._saved_count_include_pad or not any(padding)):
        divisor = 1
        for size in kernel:
            divisor *= size
    if divisor is not None:  # the squared divisor does it all
        return with_stand_in(backward, x, *settings, divisor**2)

    def formula(h: Tensor) -> Diagonals:
        ones = h.new_ones((1, *shape[-dims:]))
        c = pool(ones, *settings) / pool(ones, *settings, 1)
        return (backward(h * c, h.new_empty_strided(shape, strides), *settings, None),)

    return formula


@register_rule(*_adaptive_avg_pool_backward)
def adaptive_avg_pool(op: Operation) -> Formula:
    """``c = 1/size of the window``; output i of n averages the inputs from ``floor(i m/n)`` to ``ceil((i+1) m/n)``."""
    dims, backward = _adaptive_avg_pool_backward[op.node.name()]
    x = op.node._saved_self
    shape, strides = x.shape, x.stride()
    window: Any = 1
    for m, n in zip(shape[-dims:], op.output_shape()[-dims:], strict=True):
        if m % n == 0:
            sizes: Any = m // n
        else:
            sizes = torch.tensor([-(-(i + 1) * m // n) - i * m // n for i in range(n)], device=x.device)
        window = window[..., None] * sizes if isinstance(window, Tensor) else window * sizes
    return lambda h: (backward(h / window, h.new_empty_strided(shape, strides)),)


# -- interpolating ---------------------------------------------------------------------------------------------------

_upsample = {
    "UpsampleLinear1DBackward0": _aten.upsample_linear1d.default,
    "UpsampleBilinear2DBackward0": _aten.upsample_bilinear2d.default,
    "UpsampleBilinear2DAaBackward0": _aten._upsample_bilinear2d_aa.default,
    "UpsampleBicubic2DBackward0": _aten.upsample_bicubic2d.default,
    "UpsampleBicubic2DAaBackward0": _aten._upsample_bicubic2d_aa.default,
    "UpsampleTrilinear3DBackward0": _aten.upsample_trilinear3d.default,
}


@register_rule(*_upsample)
def interpolate(op: Operation) -> Formula:
    """``c = c_1 c_2 ..``, a factor for each axis, so ``h_x`` is h times a matrix of squared factors along each axis.

    A factor must be complete before it is squared: at the edges several taps fall on one pixel. The matrices are small,
    and products with them are faster than the operation's own backward until an axis has some hundred pixels.
    """
    node = op.node
    name, align_corners = node.name(), node._saved_align_corners
    inputs, outputs = node._saved_self_sym_sizes[2:], node._saved_output_size
    names = ["_saved_scales"] if len(inputs) == 1 else [f"_saved_scales_{axis}" for axis in "dhw"[3 - len(inputs) :]]
    scales = [getattr(node, name) for name in names]
    factors = list(zip(inputs, outputs, scales, strict=True))

    def formula(h: Tensor) -> Diagonals:
        *others, last = [_squared_factors(name, *f, align_corners, h.dtype, h.device) for f in factors]
        h = h @ last.t()
        for axis in range(len(others), 0, -1):
            shape = h.shape
            h = (others[axis - 1] @ h.flatten(axis + 2)).view(*shape[: axis + 1], -1, *shape[axis + 2 :])
        return (h,)

    return formula


@lru_cache(maxsize=64)
def _squared_factors(
    name: str, m: int, n: int, scale: float | None, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The (m, n) squared factors between m pixels of an axis and n interpolated ones, by interpolating unit vectors."""
    forward = _upsample[name]
    dims = next(int(c) for c in name if c.isdigit())
    others = dims - 1
    units = torch.eye(m, dtype=torch.float64).view(1, m, *[1] * others, m)
    factors: Tensor = forward(units, [*[1] * others, n], align_corners, *[None] * others, scale).view(m, n)
    return factors.square().to(device, dtype)
