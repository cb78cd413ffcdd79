"""Layer, group, instance and batch norm: exact local diagonals in closed form, linear cost.

With ``z = (x - mu) / s`` over the ``N`` entries of a group, ``g`` and ``h`` at ``z``, ``H_k = sum z^k h``, ``G_k = sum
z^k g``:

    h_x = [h (1 - 2 (1 + z^2)/N) + (H_0 + 2 z H_1 + z^2 H_2)/N^2] / s^2
        + [-2 z (g - G_0/N) - G_1 (1 - (1 + 3 z^2)/N)] / (N s^2)

which is evaluated as ``c h + k_0 + z (k_1 + e g + z (k_2 + d h))`` with coefficients that are constant in a group. The
affine map after it, ``y = gamma z + beta``, gives ``h_gamma = sum h z^2`` and ``h_beta = sum h`` with ``h`` at ``y``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

Moments = tuple[Tensor, Tensor, Tensor]


def _moments(z: Tensor, h: Tensor, dims: tuple[int, ...]) -> Moments:
    """``H_0, H_1, H_2``, with the group's dimensions kept."""
    zh = z * h
    return h.sum(dims, keepdim=True), zh.sum(dims, keepdim=True), zh.mul_(z).sum(dims, keepdim=True)


def _through_group(
    z: Tensor,
    inverse: Tensor,
    slope: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    dims: tuple[int, ...],
    moments: Moments | None = None,
) -> Tensor:
    """``h_x`` by the formula above, for ``y = gamma z`` with ``gamma`` constant in a group.

    Args:
        z: The normalised input.
        inverse: ``1 / s``, broadcastable to ``z``.
        slope: ``gamma / s``, broadcastable to ``z``.
        g: Gradient at ``y``, or None.
        h: Curvature at ``y``, or None for zero.
        dims: The dimensions that make up a group.
        moments: Those of ``h``, if they are known already.
    """
    n = math.prod([z.shape[d] for d in dims])
    result: Tensor | None = None  # grows from the inside of the nested form
    if h is not None:
        h0, h1, h2 = moments or _moments(z, h, dims)
        a = slope.square()
        k0, k1, k2 = h0 * (a / n**2), h1 * (2 * a / n**2), h2 * (a / n**2)
        result = torch.addcmul(k2, h, a * (-2 / n))
    if g is not None:
        b = inverse * slope / n
        g1 = (z * g).sum(dims, keepdim=True) * b
        made0, made1, made2 = g1 * (1 / n - 1), g.sum(dims, keepdim=True) * (2 * b / n), g1 * (3 / n)
        if result is None:
            k0, k1, result = made0, made1, made2.expand(z.shape).clone()
        else:
            k0, k1, result = k0 + made0, k1 + made1, result.add_(made2)
        result.mul_(z).add_(k1).addcmul_(g, -2 * b)
    else:
        assert result is not None  # one of g and h is there
        result.mul_(z).add_(k1)
    result.mul_(z).add_(k0)
    return result if h is None else result.addcmul_(h, a * (1 - 2 / n))


@register_rule("NativeLayerNormBackward0", curved=True)
def layer_norm(op: Operation) -> Formula:
    node = op.node
    x, mean, inverse, weight = node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight
    rank = len(node._saved_normalized_shape)
    dims = tuple(range(x.dim() - rank, x.dim()))
    rows = tuple(range(x.dim() - rank))
    need_x, need_weight, need_bias = op.needs

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        z = (full(x) - full(mean)).mul_(full(inverse))
        h_x = h_weight = h_bias = None
        if h is not None:
            if need_weight:
                h_weight = (z * z).mul_(h)
                h_weight = h_weight.sum(rows) if rows else h_weight
            if need_bias:
                h_bias = h.sum(rows) if rows else h
        if need_x:
            if weight is not None:
                gamma = full(weight)
                g = None if g is None else g * gamma
                h = None if h is None else h * gamma.square()
            s = full(inverse)
            h_x = _through_group(z, s, s, g, h, dims)
        return h_x, h_weight, h_bias

    return formula


@register_rule("NativeGroupNormBackward0", curved=True)
def group_norm(op: Operation) -> Formula:
    node = op.node
    x, mean, inverse, weight = node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight
    samples, groups = int(node._saved_N), int(node._saved_group)
    need_x, need_weight, need_bias = op.needs

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        channels = x.shape[1]
        per_channel = (samples, channels, -1)
        grouped = (samples, groups, -1)
        s = full(inverse).reshape(samples, groups, 1)
        z = (full(x).reshape(grouped) - full(mean).reshape(samples, groups, 1)).mul_(s)
        h_x = h_weight = h_bias = None
        if h is not None:
            h = h.reshape(per_channel)
            if need_weight:
                h_weight = (z.reshape(per_channel).square() * h).sum((0, 2))
            if need_bias:
                h_bias = h.sum((0, 2))
        if need_x:
            gamma = None if weight is None else full(weight).reshape(1, channels, 1)
            if g is not None:
                g = g.reshape(per_channel)
                g = (g if gamma is None else g * gamma).reshape(grouped)
            if h is not None:
                h = (h if gamma is None else h * gamma.square()).reshape(grouped)
            h_x = _through_group(z, s, s, g, h, (2,)).reshape(x.shape)
        return h_x, h_weight, h_bias

    return formula


@register_rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", curved=True)
def batch_norm(op: Operation) -> Formula:
    """In eval mode the statistics are constants: ``h_x = h gamma^2 / (var + eps)``."""
    node = op.node
    x, weight = node._saved_input, node._saved_weight
    shape = (1, -1) + (1,) * (x.dim() - 2)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    need_x, need_weight, need_bias = op.needs
    if not node._saved_training:
        op.curved = False
        eps = node._saved_epsilon if node.name() == "CudnnBatchNormBackward0" else node._saved_eps
        center, scale = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
        return _affine(x, center, scale, weight, dims, shape, op.needs)
    center, inverse = node._saved_result1, node._saved_result2

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        s = full(inverse).reshape(shape)
        z = (full(x) - full(center).reshape(shape)).mul_(s)
        moments = _moments(z, h, dims) if h is not None else None
        slope = s if weight is None else s * full(weight).reshape(shape)
        return (
            _through_group(z, s, slope, g, h, dims, moments) if need_x else None,
            moments[2].reshape(-1) if need_weight and moments is not None else None,
            moments[0].reshape(-1) if need_bias and moments is not None else None,
        )

    return formula


def _affine(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dims: tuple[int, ...],
    shape: tuple[int, ...],
    needs: list[bool],
) -> Formula:
    """``y = gamma (x - mu) / s + beta`` with statistics that are constants."""
    need_x, need_weight, need_bias = needs

    def formula(h: Tensor) -> Diagonals:
        s = full(scale)
        h_weight = None
        if need_weight:
            h_weight = ((full(x) - full(center).reshape(shape)).mul_(s.reshape(shape)).square_().mul_(h)).sum(dims)
        slope = s if weight is None else s * full(weight)
        return (
            h * slope.square().reshape(shape) if need_x else None,
            h_weight,
            h.sum(dims) if need_bias else None,
        )

    return formula


@register_rule("FusedRmsNormBackward0", curved=True)
def rms_norm(op: Operation) -> Formula:
    """``[h (1 - 2 z^2/N) + z^2 H_2/N^2] / s^2 + [-2 z g - G_1 (1 - 3 z^2/N)] / (N s^2)`` with ``z = x / s``."""
    node = op.node
    x, inverse, weight = node._saved_input, node._saved_result1, node._saved_weight
    rank = len(node._saved_normalized_shape)
    dims = tuple(range(x.dim() - rank, x.dim()))
    rows = tuple(range(x.dim() - rank))
    need_x, need_weight = op.needs

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        s = full(inverse)
        z = full(x) * s
        h_x = h_weight = None
        if need_weight and h is not None:
            h_weight = z * z * h
            h_weight = h_weight.sum(rows) if rows else h_weight
        if need_x:
            n = z[(0,) * len(rows)].numel()
            square = z * z
            if weight is not None:
                g = None if g is None else g * full(weight)
                h = None if h is None else h * full(weight).square()
            h_x = torch.zeros_like(z)
            if h is not None:
                h_x = h * (1 - square * (2 / n)) + square * ((square * h).sum(dims, keepdim=True) / n**2)
            if g is not None:
                g1 = (z * g).sum(dims, keepdim=True) / n
                h_x = h_x - z * g * (2 / n) - g1 * (1 - square * (3 / n))
            h_x = h_x * s.square()
        return h_x, h_weight

    return formula


@register_rule("WeightNormInterfaceBackward0", curved=True)
def weight_norm(op: Operation) -> Formula:
    """``w = gamma u`` with ``u = v / |v|`` for each slice along a dimension; ``h_gamma = sum u^2 h``.

    ``h_v = gamma^2 [h (1 - 2 u^2) + u^2 sum u^2 h] / |v|^2 + gamma [-2 u g - (1 - 3 u^2) sum u g] / |v|^2``.
    """
    node = op.node
    v, gamma, norm = node._saved_v, node._saved_g, node._saved_result1
    dims = tuple(d for d in range(v.dim()) if d != node._saved_dim)
    need_v, need_gamma = op.needs

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        inverse = 1 / full(norm)
        scale = full(gamma)
        u = full(v) * inverse
        square = u * u
        h_v = h_gamma = None
        total = None if h is None else (square * h).sum(dims, keepdim=True)
        if need_gamma and total is not None:
            h_gamma = total.view(gamma.shape)
        if need_v:
            h_v = torch.zeros_like(u)
            if h is not None and total is not None:
                h_v = scale.square() * (h * (1 - 2 * square) + square * total)
            if g is not None:
                h_v = h_v - scale * (2 * u * g + (1 - 3 * square) * (u * g).sum(dims, keepdim=True))
            h_v = h_v * inverse.square()
        return h_v, h_gamma

    return formula
