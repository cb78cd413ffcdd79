"""Pooling and resampling of the last one to three dimensions, and sampling at the points of a grid.

All are linear in each region, ``y_j = sum_i c_ji x_i``, so ``h_x = sum_j c_ji^2 h_j``. A maximum selects (c is 0 or 1).
An average has one coefficient for each window, ``c_j``; its backward multiplies by c once, so it is given ``c_j h_j``.
Interpolation has coefficients that are products of one factor for each axis, and so are their squares.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature.capturing import on_real_tensors
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

_aten = torch.ops.aten

# -- selecting -------------------------------------------------------------------------------------------------------

#: By node, its backward, and what that takes besides the gradient and the input, of which only the shape counts.
_max_pools = {
    "MaxPool2DWithIndicesBackward0": (
        _aten.max_pool2d_with_indices_backward.default, ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    ),
    "MaxPool3DWithIndicesBackward0": (
        _aten.max_pool3d_with_indices_backward.default, ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    ),
    "AdaptiveMaxPool2DBackward0": (_aten.adaptive_max_pool2d_backward.default, ()),
    "AdaptiveMaxPool3DBackward0": (_aten.adaptive_max_pool3d_backward.default, ()),
    "FractionalMaxPool2DBackward0": (_aten.fractional_max_pool2d_backward.default, ("kernel_size", "output_size")),
    "FractionalMaxPool3DBackward0": (_aten.fractional_max_pool3d_backward.default, ("kernel_size", "output_size")),
}  # fmt: skip


@register_rule(*_max_pools)
def max_pool(op: Operation, h: Value) -> Value:
    """``y_j = x[index_j]``."""
    backward, settings = _max_pools[op.name]
    return backward(h, op.input(0, "self"), *[op.number(name) for name in settings], op.tensor("result1"))


@register_rule("MaxUnpool2DBackward0", "MaxUnpool3DBackward0")
def max_unpool(op: Operation, h: Value) -> Value:
    """``y[index_j] = x_j``."""
    dims = 2 if op.name == "MaxUnpool2DBackward0" else 3
    return h.flatten(-dims).gather(-1, op.tensor("indices").flatten(-dims)).reshape(op.input_shape(0))


@register_rule(
    "UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0", "UpsampleNearest3DBackward0",
    "UpsampleNearestExact1DBackward0", "UpsampleNearestExact2DBackward0", "UpsampleNearestExact3DBackward0",
)  # fmt: skip
def nearest(op: Operation, h: Value) -> Value:
    """Every output is a copy of one input: ``J^T h``."""
    return op.backward(h)


# -- averaging -------------------------------------------------------------------------------------------------------

_avg_pool = {
    "AvgPool2DBackward0": (2, F.avg_pool2d, _aten.avg_pool2d_backward.default),
    "AvgPool3DBackward0": (3, F.avg_pool3d, _aten.avg_pool3d_backward.default),
}
_adaptive_avg_pool = {
    "AdaptiveAvgPool2DBackward0": (2, _aten._adaptive_avg_pool2d_backward.default),
    "AdaptiveAvgPool3DBackward0": (3, _aten._adaptive_avg_pool3d_backward.default),
}


@register_rule(*_avg_pool)
def avg_pool(op: Operation, h: Value) -> Value:
    """``c = 1/divisor``: the same for all windows, except where windows are cut off at an edge."""
    dims, _, backward = _avg_pool[op.name]
    kernel, padding, divisor = op.number("kernel_size"), op.number("padding"), op.number("divisor_override")
    ceil, count_padding = op.number("ceil_mode"), op.number("count_include_pad")
    settings = kernel, op.number("stride"), padding, ceil, count_padding
    if divisor is None and (ceil or (any(padding) and not count_padding)):
        c = _of_windows(op.name, op.input_shape(0)[-dims:], settings, op.input_dtype(0), op.input_meta(0)[1])
    else:
        c = 1 / (math.prod(kernel) if divisor is None else divisor)
    return backward(h * c, op.input(0, "self"), *settings, divisor)


@opaque
def _of_windows(name: str, sizes: tuple[int, ...], settings: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return on_real_tensors(_coefficients_of_windows, name, tuple(sizes), settings, dtype, device)


@functools.lru_cache(maxsize=64)
def _coefficients_of_windows(
    name: str, sizes: tuple[int, ...], settings: Any, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``1/divisor`` of each window: the average of ones over their sum, which is 1 where none is padding."""
    pool: Any = _avg_pool[name][1]
    ones = torch.ones((1, *sizes), dtype=dtype, device=device)
    c: Tensor = pool(ones, *settings) / pool(ones, *settings, 1)
    return c


@register_rule(*_adaptive_avg_pool)
def adaptive_avg_pool(op: Operation, h: Value) -> Value:
    """``c = 1/size of the window``; output i of n averages the inputs from ``floor(i m/n)`` to ``ceil((i+1) m/n)``."""
    dims, backward = _adaptive_avg_pool[op.name]
    inputs, outputs = op.input_shape(0)[-dims:], op.output_shape()[-dims:]
    if all(m % n == 0 for m, n in zip(inputs, outputs, strict=True)):
        c: Any = math.prod(outputs) / math.prod(inputs)
    else:
        c = _of_adaptive_windows(tuple(inputs), tuple(outputs), op.input_dtype(0), op.input_meta(0)[1])
    return backward(h * c, op.input(0, "self"))


@opaque
def _of_adaptive_windows(
    inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return on_real_tensors(_coefficients_of_adaptive_windows, inputs, outputs, dtype, device)


@functools.lru_cache(maxsize=64)
def _coefficients_of_adaptive_windows(
    inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    c = torch.ones((), dtype=dtype)
    for m, n in zip(inputs, outputs, strict=True):
        c = c[..., None] / torch.tensor([-(-(i + 1) * m // n) - i * m // n for i in range(n)])
    return c.to(device)


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
def interpolate(op: Operation, h: Value) -> Value:
    """``c = c_1 c_2 ..``, a factor for each axis, so ``h_x`` is h times a matrix of squared factors along each axis.

    A factor must be complete before it is squared: at the edges several taps fall on one pixel. The matrices are small,
    and products with them are faster than the operation's own backward until an axis has some hundred pixels.
    """
    inputs, outputs = op.input_shape(0)[2:], op.output_shape()[2:]
    names = ["scales"] if len(inputs) == 1 else [f"scales_{axis}" for axis in "dhw"[3 - len(inputs) :]]
    axes = tuple(zip(inputs, outputs, [op.number(name) for name in names], strict=True))
    return _through_axes(h, op.name, axes, op.number("align_corners"))


@opaque
def _through_axes(h: Tensor, name: str, axes: tuple[tuple[int, int, float | None], ...], align_corners: bool) -> Tensor:
    *others, last = [on_real_tensors(_squared_factors, name, *axis, align_corners, h.dtype, h.device) for axis in axes]
    h = h @ last.t()
    for axis in range(len(others), 0, -1):
        shape = h.shape
        h = (others[axis - 1] @ h.flatten(axis + 2)).view(*shape[: axis + 1], -1, *shape[axis + 2 :])
    return h


@functools.lru_cache(maxsize=64)
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


# -- sampling at the points of a grid --------------------------------------------------------------------------------

_NEAREST, _CUBIC = 1, 2  # torch's numbers of the ways to interpolate, and to go on beyond the edges
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


@register_rule(
    "GridSampler2DBackward0", "GridSampler3DBackward0",
    curved=lambda op: bool(op.need(1)) and op.number("interpolation_mode") == _CUBIC,
    bilinear=True,
)  # fmt: skip
def grid_sampler(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """At the input ``sum c^2 h`` as above; at a point ``sum (dy/dp)^2 h + d2y/dp^2 g`` over its channels."""
    settings = op.number("interpolation_mode"), op.number("padding_mode"), op.number("align_corners")
    return _sampled(op.input(0, "input"), op.input(1, "grid"), g, h, settings, tuple(op.needs))  # type: ignore[no-any-return]


@register_rule("CudnnGridSamplerBackward0", bilinear=True)
def cudnn_grid_sampler(op: Operation, h: Value) -> Sequence[Value]:
    """Bilinear, with zeros beyond the edges and aligned corners, which is all that cuDNN does."""
    return _sampled(op.input(0, "self"), op.input(1, "grid"), None, h, (0, _ZEROS, True), tuple(op.needs))  # type: ignore[no-any-return]


@opaque
def _sampled(
    x: Tensor,
    grid: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    settings: tuple[int, int, bool],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """One tap after another: ``y = sum x[i, j, ..] w_i w_j ..``, with a factor for each axis, in any number of axes."""
    channels, *sizes = x.shape[1:]
    points = grid.flatten(1, -2)
    axes = [_taps(points[..., k], size, *settings) for k, size in enumerate(reversed(sizes))][::-1]
    flat = x.flatten(2)
    g, h = (None if t is None else t.flatten(2) for t in (g, h))
    h_x = torch.zeros_like(flat) if needs[0] and h is not None else None
    dims = len(axes)
    first: list[Any] = [0.0] * dims  # dy/dp by axis, and d2y/dp^2
    second: list[Any] = [0.0] * dims
    for taps in itertools.product(*axes):
        index = taps[0].index
        for tap, size in zip(taps[1:], sizes[1:], strict=True):
            index = index * size + tap.index
        index = index.unsqueeze(1).expand(-1, channels, -1)
        if h_x is not None and h is not None:
            h_x.scatter_add_(2, index, h * _product([tap.square for tap in taps]).unsqueeze(1))
        if needs[1]:
            value = flat.gather(2, index)
            for k, tap in enumerate(taps):
                rest = _product([other.weight for j, other in enumerate(taps) if j != k])
                if tap.slope is not None:
                    first[k] = first[k] + value * (tap.slope * rest).unsqueeze(1)
                if tap.bend is not None and g is not None:
                    second[k] = second[k] + value * (tap.bend * rest).unsqueeze(1)
    h_grid = None
    if needs[1] and settings[0] != _NEAREST:
        total: list[Any] = [0.0 if h is None else (f * f * h).sum(1) for f in first]
        if g is not None and settings[0] == _CUBIC:
            total = [t + (s * g).sum(1) for t, s in zip(total, second, strict=True)]
        h_grid = None if isinstance(total[0], float) else torch.stack(total[::-1], -1).view(grid.shape)
    return None if h_x is None else h_x.view(x.shape), h_grid


def _product(factors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, factors)


@dataclass(slots=True)
class _Tap:
    """Of each point, a pixel along one axis.

    Attributes:
        index: Its number.
        weight: Its factor in y.
        square: What adds up to the squared factor: times the weights of all taps on the same pixel.
        slope: First derivative of the weight by the coordinate; None: zero.
        bend: Second derivative, likewise.
    """

    index: Tensor
    weight: Tensor
    square: Tensor
    slope: Tensor | None = None
    bend: Tensor | None = None


def _taps(p: Tensor, size: int, mode: int, padding: int, align_corners: bool) -> list[_Tap]:
    """The taps of an axis, for coordinates from -1 to 1."""
    stretch = (size - 1) / 2 if align_corners else size / 2
    p = (p + 1) * stretch - (0 if align_corners else 0.5)
    if mode == _CUBIC:
        return _cubic_taps(p, size, padding, stretch, align_corners)
    p, sign = _padded(p, size, padding, align_corners)
    if mode == _NEAREST:
        at = p.round()
        index, inside = _index(at, size)
        return [_Tap(index, inside.to(p.dtype), inside.to(p.dtype))]
    low = p.floor()
    apart = p - low
    taps = []
    for k, weight, slope in ((0, 1 - apart, -sign * stretch), (1, apart, sign * stretch)):
        index, inside = _index(low + k, size)
        weight = weight.where(inside, 0.0)
        taps.append(_Tap(index, weight, weight * weight, slope.where(inside, 0.0)))
    return taps


def _cubic_taps(p: Tensor, size: int, padding: int, stretch: float, align_corners: bool) -> list[_Tap]:
    """Beyond the edges it is the pixels that are padded, not the coordinate, so taps may meet on one."""
    low = p.floor()
    apart = p - low
    taps = []
    for k in range(-1, 3):
        pixel, _ = _padded(low + k, size, padding, align_corners)
        index, inside = _index(pixel, size)
        d = (apart - k).abs()
        sign = (apart - k).sign() if k in (0, 1) else (1.0 if k < 0 else -1.0)
        if k in (0, 1):
            weight, slope, bend = (1.25 * d - 2.25) * d * d + 1, (3.75 * d - 4.5) * d, 7.5 * d - 4.5
        else:
            weight = ((-0.75 * d + 3.75) * d - 6) * d + 3
            slope, bend = (-2.25 * d + 7.5) * d - 6, -4.5 * d + 7.5
        parts = weight, weight, slope * sign * stretch, bend * stretch**2
        taps.append(_Tap(index, *[part.where(inside, 0.0) for part in parts]))
    for tap in taps:
        together = torch.stack([other.weight.where(other.index == tap.index, 0.0) for other in taps])
        tap.square = tap.weight * together.sum(0)
    return taps


def _padded(p: Tensor, size: int, padding: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The coordinate that is looked up for ``p``, and its derivative by ``p``: 1, -1, or 0 where it is held."""
    sign = torch.ones_like(p)
    if padding == _ZEROS:
        return p, sign
    if padding == _REFLECTION:
        low, span = (0.0, float(size - 1)) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(p), torch.zeros_like(p)
        sign = sign.where(p >= low, -1.0)
        away = (p - low).abs()
        flips = (away / span).floor()
        away = away - flips * span
        odd = flips % 2 != 0
        p, sign = low + torch.where(odd, span - away, away), torch.where(odd, -sign, sign)
    return p.clamp(0, size - 1), sign.where((p > 0) & (p < size - 1), 0.0)


def _index(at: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The pixels at whole coordinates, and which exist; the others, among them NaN, are pixel 0."""
    inside = (at >= 0) & (at <= size - 1)
    return at.where(inside, 0.0).long(), inside
