"""Layer, group, instance, batch and RMS norm, and weight norm: exact local diagonals in closed form, linear cost.

With ``z = (x - mu) / s`` over the ``N`` entries of a group, ``g`` and ``h`` at ``z``, ``H_k = sum z^k h``, ``G_k = sum
z^k g``:

    h_x = [h (1 - 2 (1 + z^2)/N) + (H_0 + 2 z H_1 + z^2 H_2)/N^2] / s^2
        + [-2 z (g - G_0/N) - G_1 (1 - (1 + 3 z^2)/N)] / (N s^2)

and where no mean is taken off, as in RMS norm, with ``z = x / s``:

    h_x = [h (1 - 2 z^2/N) + z^2 H_2/N^2] / s^2 + [-2 z g - G_1 (1 - 3 z^2/N)] / (N s^2)

Both are a polynomial in ``z``, ``(c h + k_0 + z (k_1 + k_2 z - 2 N (g + z h))) / (N s)^2``, whose coefficients are
constant in a group. The affine map after it, ``y = gamma z + beta``, gives ``h_gamma = sum h z^2`` and ``h_beta = sum
h`` with ``h`` at ``y``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

# On the CPU addcmul is several times slower where more than one operand is constant along the last dimension.


@opaque
def _through_group(
    z: Tensor,
    inverse: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    h2: Tensor | None,
    dims: tuple[int, ...],
    n: int,
    centered: bool,
) -> Tensor:
    """``h_x`` by the polynomial above, in few passes.

    Args:
        z: The normalised input.
        inverse: ``1 / s``, broadcastable to ``z``.
        g: Gradient at ``z``, or None.
        h: Curvature at ``z``, or None for zero.
        h2: ``H_2``, of the shape of ``inverse``, or None.
        dims: The dimensions that make up a group.
        n: N.
        centered: Whether a mean was taken off.
    """
    if g is None:
        assert h is not None  # one of g and h is there
        assert h2 is not None
        moved = z * h
        result = z * h2
        k0 = h.sum(dims, keepdim=True) if centered else None
    else:
        moved = g if h is None else torch.addcmul(g, z, h)
        result = z * g
        g1 = result.sum(dims, keepdim=True)
        k0 = g1 * (1 - n) if centered else g1 * -n
        if h is not None and centered:
            k0 += h.sum(dims, keepdim=True)
        torch.mul(z, 3 * g1 if h2 is None else torch.add(h2, g1, alpha=3), out=result)
    if centered:
        result.add_(moved.sum(dims, keepdim=True), alpha=2)
    result.add_(moved, alpha=-2 * n)
    result = result.mul_(z) if k0 is None else torch.addcmul(k0, result, z, out=result)
    if h is not None:
        result.add_(h, alpha=n * (n - 2) if centered else n * n)
    return result.mul_((inverse / n).square_())


def _scaled(x: Value, factor: Value) -> Value:
    """``x factor``; no factor is 1."""
    return x if factor is None else x * factor


def _summed(x: Value, dims: tuple[int, ...]) -> Value:
    """Over ``dims``, of which there may be none."""
    return x.sum(dims) if dims else x


def _normalized_rows(op: Operation, z: Value, inverse: Value, g: Value, h: Value, centered: bool) -> tuple[Value, ...]:
    """At input, weight and bias, for ``y = gamma z + beta`` with a gamma for each entry of a group."""
    weight = op.tensor("weight")
    shape = op.number("normalized_shape")
    rank = len(op.output_shape())
    dims = tuple(range(rank - len(shape), rank))
    rows = tuple(range(rank - len(shape)))
    square = None if weight is None else weight * weight
    spread = z * z * h
    h_x = None
    if op.need(0):
        h2 = _scaled(spread, square).sum(dims, keepdim=True)
        h_x = _through_group(z, inverse, _scaled(g, weight), _scaled(h, square), h2, dims, math.prod(shape), centered)
    return h_x, op.need(1) and _summed(spread, rows), len(op.needs) > 2 and op.need(2) and _summed(h, rows)


@register_rule("NativeLayerNormBackward0")
def layer_norm(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    x, mean, inverse = op.input(0, "input"), op.tensor("result1"), op.tensor("result2")
    return _normalized_rows(op, (x - mean) * inverse, inverse, g, h, True)


@register_rule("FusedRmsNormBackward0")
def rms_norm(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """``[h (1 - 2 z^2/N) + z^2 H_2/N^2] / s^2 + [-2 z g - G_1 (1 - 3 z^2/N)] / (N s^2)`` with ``z = x / s``."""
    inverse = op.tensor("result1")
    return _normalized_rows(op, op.input(0, "input") * inverse, inverse, g, h, False)[:2]


@register_rule("NativeGroupNormBackward0")
def group_norm(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    x, weight = op.input(0, "input"), op.tensor("weight")
    samples, groups, channels = op.number("N"), op.number("group"), op.number("C")
    size = channels // groups * op.number("HxW")
    by_group, by_channel = (samples, groups, size), (samples, channels, -1)
    inverse = op.tensor("result2").reshape(samples, groups, 1)
    z = (x.reshape(by_group) - op.tensor("result1").reshape(samples, groups, 1)) * inverse
    g, h = g.reshape(by_channel), h.reshape(by_channel)
    at_z = z.reshape(by_channel)
    spread = at_z * at_z * h
    h_x = None
    if op.need(0):
        gamma = None if weight is None else weight.reshape(1, channels, 1)
        square = None if gamma is None else gamma * gamma
        h2 = _scaled(spread, square).reshape(by_group).sum(2, keepdim=True)
        at_group = _scaled(g, gamma).reshape(by_group), _scaled(h, square).reshape(by_group)
        h_x = _through_group(z, inverse, *at_group, h2, (2,), size, True).reshape(op.output_shape())
    return h_x, op.need(1) and spread.sum((0, 2)), op.need(2) and h.sum((0, 2))


@register_rule(
    "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0",
    curved=lambda op: bool(op.number("training")),
)  # fmt: skip
def batch_norm(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """In eval mode the statistics are constants: ``h_x = h gamma^2 / (var + eps)``."""
    x, weight = op.input(0, "input"), op.tensor("weight")
    if op.number("training"):
        return _through_batch(x, op.tensor("result1"), op.tensor("result2"), weight, g, h, op.need(0))  # type: ignore[no-any-return]
    rank = len(op.output_shape())
    shape, dims = (1, -1) + (1,) * (rank - 2), (0, *range(2, rank))
    scale = 1 / (op.tensor("running_var") + op.number("epsilon" if op.has("epsilon") else "eps"))
    apart = x - op.tensor("running_mean").reshape(shape)
    slope = _scaled(scale, None if weight is None else weight * weight)
    return (
        op.need(0) and h * slope.reshape(shape),
        op.need(1) and (apart * apart * h).sum(dims) * scale,
        op.need(2) and h.sum(dims),
    )


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


@opaque
def _through_batch(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, g: Tensor | None, h: Tensor | None, need_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """At input, weight and bias: the polynomial above, in ``u = x - mu`` and with ``gamma`` in its coefficients.

    The sums ``sum t`` and ``sum z t`` over a batch are what batch norm's own backward computes, in one pass over both.
    """
    n = x.numel() // x.shape[1]
    shape = (1, -1) + (1,) * (x.dim() - 2)

    def sums(t: Tensor) -> tuple[Tensor, Tensor]:
        _, along, total = _batch_norm_backward(t, x, None, None, None, mean, inverse, True, 0.0, [False, True, True])
        return total, along

    u = x - mean.view(shape)
    result = h0 = h1 = h2 = None
    if h is not None:
        result = u * h
        h1, h2 = sums(result)
        h1, h2 = h1 * inverse, h2 * inverse
        h0 = _per_channel(h)
    if not need_x:
        return None, h2, h0
    at_g = inverse.square() / n**2
    if weight is not None:
        at_g *= weight  # the factor of what is linear in gamma
    at_h = at_g if weight is None else at_g * weight  # and in its square
    k0, k1, k2 = (0.0 if moment is None else at_h * moment for moment in (h0, h1, h2))
    if g is not None:
        g0, g1 = sums(g)
        g1 *= at_g
        k0, k1, k2 = k0 + g1 * (1 - n), k1 + at_g * g0, k2 + g1 * 3
    if result is not None:
        result.mul_((at_h * inverse.square() * (-2 * n)).view(shape))
    if g is not None:
        factor = (at_g * inverse * (-2 * n)).view(shape)
        result = g * factor if result is None else result.addcmul_(g, factor)
    assert isinstance(k0, Tensor)  # one of g and h is there
    assert isinstance(k1, Tensor)
    assert isinstance(k2, Tensor)
    assert result is not None
    result.addcmul_(u, (k2 * inverse.square()).view(shape)).add_((k1 * inverse).view(shape), alpha=2)
    torch.addcmul(k0.view(shape), result, u, out=result)
    if h is not None:
        result.addcmul_(h, (at_h * (n * (n - 2))).view(shape))
    return result, h2, h0


def _per_channel(x: Tensor) -> Tensor:
    """Sums over all dimensions but the second; in two steps, which is faster where a sample's entries are adjacent."""
    if x.dim() > 2 and x.is_contiguous():
        return x.flatten(2).sum(2).sum(0)
    return x.sum([d for d in range(x.dim()) if d != 1])


@register_rule("WeightNormInterfaceBackward0")
def weight_norm(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """``w = gamma u`` with ``u = v / |v|`` for each slice along a dimension; ``h_gamma = sum u^2 h``.

    ``h_v = gamma^2 [h (1 - 2 u^2) + u^2 sum u^2 h] / |v|^2 + gamma [-2 u g - (1 - 3 u^2) sum u g] / |v|^2``, which is
    RMS norm's with ``N = 1``.
    """
    v, gamma = op.input(0, "v"), op.input(1, "g")
    dims = tuple(d for d in range(len(op.output_shape())) if d != op.number("dim"))
    inverse = 1 / op.tensor("result1")
    u = v * inverse
    h_gamma = (u * u * h).sum(dims, keepdim=True)
    square = gamma * gamma
    h_v = op.need(0) and _through_group(u, inverse, g * gamma, h * square, h_gamma * square, dims, 1, False)
    return h_v, op.need(1) and h_gamma
