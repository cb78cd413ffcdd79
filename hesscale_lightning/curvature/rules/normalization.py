"""Layer, group, instance and batch norm: exact local diagonals in closed form, linear cost.

With ``z = (x - mu) / s`` over the ``N`` entries of a group, ``g`` and ``h`` at ``z``, ``H_k = sum z^k h``, ``G_k = sum z^k g``:

    h_x = [h (1 - 2 (1 + z^2)/N) + (H_0 + 2 z H_1 + z^2 H_2)/N^2] / s^2
        + [-2 z (g - G_0/N) - G_1 (1 - (1 + 3 z^2)/N)] / (N s^2)

which is evaluated as ``c h + k_0 + z (k_1 + e g + z (k_2 + d h))`` with coefficients that are constant in a group. The
affine map after it, ``y = gamma z + beta``, gives ``h_gamma = sum h z^2`` and ``h_beta = sum h`` with ``h`` at ``y``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


def _through_group(
    z: Tensor, inverse: Tensor, gamma: Tensor | float, g: Tensor | None, h: Tensor | None, dims: Sequence[int]
) -> Tensor:
    """``h_x`` by the formula above, for ``y = gamma z`` with ``gamma`` constant in a group.

    Args:
        z: The normalised input.
        inverse: ``1 / s``, broadcastable to ``z``.
        gamma: Scale of the group, broadcastable like ``inverse``.
        g: Gradient at ``y``, or None.
        h: Curvature at ``y``, or None for zero.
        dims: The dimensions that make up a group.
    """
    n = 1
    for d in dims:
        n *= z.shape[d]
    result = torch.zeros_like(z)
    k0: Tensor | float = 0.0
    k1: Tensor | float = 0.0
    k2: Tensor | float = 0.0
    if h is not None:
        a = (inverse * gamma).square()
        zh = z * h
        scale = a / n**2
        k0 = h.sum(dims, keepdim=True) * scale
        k1 = zh.sum(dims, keepdim=True) * (2 * scale)
        k2 = (zh * z).sum(dims, keepdim=True) * scale
        result = torch.addcmul(k2, h, a * (-2 / n))
    if g is not None:
        b = inverse.square() * gamma / n
        g1 = (z * g).sum(dims, keepdim=True) * b
        k0 = k0 - g1 * (1 - 1 / n)
        k1 = k1 + g.sum(dims, keepdim=True) * (2 * b / n)
        if h is None:
            result = result + g1 * (3 / n)
        else:
            result.add_(g1 * (3 / n))
        result.mul_(z).add_(k1).addcmul_(g, -2 * b)
    else:
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
            h_x = _through_group(z, full(inverse), 1.0, g, h, dims)
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
            h_x = _through_group(z, s, 1.0, g, h, (2,)).reshape(x.shape)
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
    cudnn = node.name() == "CudnnBatchNormBackward0"
    training = node._saved_training
    if training:
        center, inverse = node._saved_result1, node._saved_result2
    else:
        center, variance, eps = node._saved_running_mean, node._saved_running_var, node._saved_epsilon if cudnn else node._saved_eps
        inverse = (variance + eps).rsqrt()
        op.curved = False

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        s = full(inverse).reshape(shape)
        gamma = full(weight).reshape(shape) if weight is not None else 1.0
        h_x = h_weight = h_bias = None
        z = None
        if (training and need_x) or (need_weight and h is not None):
            z = (full(x) - full(center).reshape(shape)).mul_(s)
        if h is not None:
            if need_weight:
                h_weight = (z * z).mul_(h).sum(dims)
            if need_bias:
                h_bias = h.sum(dims)
        if need_x:
            h_x = _through_group(z, s, gamma, g, h, dims) if training else h * (s * gamma).square()
        return h_x, h_weight, h_bias

    return formula if training else lambda h: formula(None, h)
