"""Norms, distances, variances: ``h_x = f'^2 h + f'' g`` with the derivatives of one result by one entry.

For a norm ``y = (sum |x|^p)^(1/p)``, with ``r = |x| / y``:

    dy/dx = sign(x) r^(p-1),    d2y/dx^2 = (p - 1) (r^(p-2) - r^(2p-2)) / y

and both are zero where ``y`` is, as for autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.elementwise import local_rule
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.rules.reduction import lowered, reduced_dims, spread
from hesscale_lightning.curvature.values import ZERO, Value, opaque

_PAIRS = 2**22  # entries of the largest temporary tensor for distances between all pairs


def _norm(x: Value, y: Value, p: float, curved: bool, dims: Any = None) -> tuple[Value, Value]:
    """First and second derivative (None: zero) of a p-norm.

    Args:
        x: The entries.
        y: The norm, broadcastable to ``x``.
        p: The order.
        curved: Whether the second is wanted.
        dims: The dimensions that the norm is over, for the order infinity, where tied entries share the gradient; None:
            each has all of it.
    """
    if p == 0:
        return torch.zeros_like(x), None
    if p == 1:
        return x.sign(), None
    if math.isinf(p):
        tied = x.abs() == y
        return x.sign() * (tied if dims is None else tied / tied.sum(dims, keepdim=True)), None
    flat = y == 0
    if p == 2:
        first = (x / y).masked_fill(flat, 0)
        return first, ((1 - first * first) / y).masked_fill(flat, 0) if curved else None
    ratio = (x.abs() / y).masked_fill(flat, 0)
    if p < 2:
        flat = flat | (x == 0)
    first = (x.sign() * ratio ** (p - 1)).masked_fill(flat, 0)
    if not curved:
        return first, None
    second = (p - 1) * (ratio ** (p - 2) - ratio ** (2 * p - 2)) / y
    return first, second.masked_fill(flat, 0)


def _order(op: Operation) -> float:
    p = op.number("ord" if op.name == "LinalgVectorNormBackward0" else "p")
    return 2.0 if p is None else float(p)


def _bends(op: Operation) -> bool:
    p = _order(op)
    return p not in (0.0, 1.0) and not math.isinf(p)


@register_rule(
    "LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3", curved=_bends
)
def norm(op: Operation, g: Value, h: Value) -> Value:
    """The norm of any order, of all entries or along dimensions."""
    x = op.input(0, "self")
    rank = x.dim()
    dims = reduced_dims(op.number("dim") if op.has("dim") else None, rank)
    keepdim = op.number("keepdim") if op.has("keepdim") else False
    y, g, h = (spread(t, dims, keepdim, rank) for t in (op.output("result"), g, h))
    first, second = _norm(x.to(y.dtype), y, _order(op), g is not ZERO, dims)
    return lowered(op, local_rule(first, second, g, h))


@register_rule("DistBackward0")
def dist(op: Operation, g: Value, h: Value) -> Any:
    """The norm of a difference.

    Where one was broadcast, derivatives by all copies of an entry add up, the mixed ones ``-(p - 1) y_i y_k / y`` too.
    """
    a, b, y, p = op.input(0, "self"), op.input(1, "other"), op.output("result"), _order(op)
    x = a - b
    first, second = _norm(x, y, p, g is not ZERO, list(range(x.dim())))

    def of(shape: torch.Size) -> Value:
        if shape == x.shape:
            return local_rule(first, second, g, h)
        mixed = ((p - 1) / y).masked_fill(y == 0, 0)
        once = first.sum_to_size(shape)
        twice = None if second is None else (second + mixed * first * first).sum_to_size(shape) - mixed * once * once
        return local_rule(once, twice, g, h)

    return of(a.shape), of(b.shape)


@register_rule("CdistBackward0", "EuclideanDistBackward0", "PdistBackward0")
def distances(op: Operation, g: Value, h: Value) -> Any:
    """Norms of the differences of all pairs of rows, in blocks of rows so that memory stays bounded."""
    p = float(op.number("p")) if op.has("p") else 2.0
    if op.name == "PdistBackward0":
        a = op.input(0, "self")
        of_a, of_b = _of_pairs(a, a, op.output("result"), p, g, h, True)
        return ZERO if of_a is ZERO else of_a + of_b
    a, b = op.input(0, "x1"), op.input(1, "x2")
    of_a, of_b = _of_pairs(a, b, op.output("result"), p, g, h, False)
    return (of_a.sum_to_size(a.shape), of_b.sum_to_size(b.shape), *[None] * (len(op.needs) - 2))


@opaque
def _of_pairs(
    a: Tensor, b: Tensor, y: Tensor, p: float, g: Tensor | None, h: Tensor | None, of_one_set: bool
) -> tuple[Tensor | None, Tensor | None]:
    if of_one_set:  # the upper triangle, without the diagonal, on which g and h are zero
        above = torch.triu_indices(len(a), len(a), 1, device=a.device).unbind()
        square = y.new_zeros(len(a), len(a))
        y = square.index_put(above, y)
        g, h = (None if x is None else square.index_put(above, x) for x in (g, h))
    rows, columns, features = y.shape[-2], y.shape[-1], a.shape[-1]
    block = max(1, _PAIRS // max(y.shape[:-2].numel() * columns * features, 1))
    of_a, of_b = [], y.new_zeros(())
    for start in range(0, rows, block):
        here = slice(start, start + block)
        x = a[..., here, None, :] - b[..., None, :, :]
        g_y, h_y = (ZERO if t is None else t[..., here, :, None] for t in (g, h))
        total = local_rule(*_norm(x, y[..., here, :, None], p, g is not None), g_y, h_y)
        if total is ZERO:  # no curvature arrives, and none is made
            return None, None
        of_a.append(total.sum(-2))
        of_b = of_b + total.sum(-3)
    return (torch.cat(of_a, -2), of_b) if of_a else (None, None)


def _variance(op: Operation, root: bool, g: Value, h: Value) -> Value:
    x, keepdim, correction = op.input(0, "self"), op.number("keepdim"), op.number("correction")
    rank = x.dim()
    dims = reduced_dims(op.number("dim"), rank)
    n = math.prod(x.shape[d] for d in dims) if rank else 1
    m = max(n - (1 if correction is None else correction), 0)
    per_entry = 1 / m if m else math.inf  # so that what has no variance has nan, as its gradient
    bend = (1 - 1 / max(n, 1)) * per_entry
    centered = x - x.mean(dims, keepdim=True)
    g, h = (spread(t, dims, keepdim, rank) for t in (g, h))
    if not root:
        return local_rule(centered * (2 * per_entry), 2 * bend, g.expand(x.shape), h)
    y = ((centered * centered).sum(dims, keepdim=True) * per_entry).sqrt()
    first = (centered * per_entry / y).masked_fill(y == 0, 0)
    second = None if g is ZERO else ((bend - first * first) / y).masked_fill(y == 0, 0)
    return local_rule(first, second, g, h)


@register_rule("VarBackward0", "StdBackward0")
def spread_of_entries(op: Operation, g: Value, h: Value) -> Value:
    """``v' = 2 (x - mean)/m``, ``v'' = 2 (1 - 1/n)/m`` with ``m = n - correction``; ``std' = (x - mean)/(m std)``."""
    return _variance(op, op.name == "StdBackward0", g, h)


@register_rule("VarMeanBackward0", "StdMeanBackward0", multi_output=True)
def spread_of_entries_and_mean(op: Operation, g: Any, h: Any) -> Value:
    """The mean adds ``h / n^2``."""
    shape = op.input_shape(0)
    dims = reduced_dims(op.number("dim"), len(shape))
    n = math.prod(shape[d] for d in dims) if shape else 1
    passed = (spread(h[1], dims, op.number("keepdim"), len(shape)) / max(n, 1) ** 2).expand(shape)
    if g[0] is ZERO and h[0] is ZERO:
        return passed
    return _variance(op, op.name == "StdMeanBackward0", g[0], h[0]) + passed


@register_rule("RenormBackward0")
def renorm(op: Operation, g: Value, h: Value) -> Value:
    """``y = s(n) x`` for the norm n of each slice, ``s = limit / (n + 1e-7)`` above the limit and 1 below.

    ``dy_j/dx_i = delta_ij s + x_j s' n_i`` and ``d2y_j/dx_i^2 = 2 delta_ij s' n_i + x_j (s'' n_i^2 + s' n_ii)``.
    """
    x, p, limit = op.input(0, "self"), float(op.number("p")), float(op.number("maxnorm"))
    kept = reduced_dims(op.number("dim"), x.dim())[0]
    dims = [d for d in range(x.dim()) if d != kept]
    n = torch.linalg.vector_norm(x, p, dims, keepdim=True)
    n_i, n_ii = _norm(x, n, p, g is not ZERO, dims)
    inverse = 1 / (n + 1e-7)
    inside = n <= limit
    s = (limit * inverse).masked_fill(inside, 1)
    s_1 = (-limit * inverse**2).masked_fill(inside, 0)
    s_2 = (2 * limit * inverse**3).masked_fill(inside, 0)
    slope = s_1 * n_i
    passed = h * (s * s + 2 * s * x * slope) + slope * slope * (x * x * h).sum(dims, keepdim=True)
    if g is ZERO:
        return passed
    bend = s_2 * n_i * n_i if n_ii is None else s_2 * n_i * n_i + s_1 * n_ii
    return passed + 2 * g * slope + bend * (x * g).sum(dims, keepdim=True)
