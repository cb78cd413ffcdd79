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

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.reduction import curve, reduced_dims, spread

_PAIRS = 2**22  # entries of the largest temporary tensor for distances between all pairs


def _norm(x: Tensor, y: Tensor, p: float, curved: bool, dims: Any = None) -> tuple[Tensor, Tensor | None]:
    """First and second derivative (None: zero) of a p-norm.

    Args:
        x: The entries.
        y: The norm, broadcastable to ``x``.
        p: The order.
        curved: Whether the second is wanted.
        dims: The dimensions that the norm is over, for the order infinity, where tied entries share the gradient.
    """
    if p == 0:
        return torch.zeros_like(x), None
    if p == 1:
        return x.sign(), None
    if math.isinf(p):
        tied = x.abs() == y
        return x.sign() * tied / tied.sum(dims, keepdim=True), None
    flat = y == 0
    ratio = (x.abs() / y).masked_fill(flat, 0)
    if p < 2:
        flat = flat | (x == 0)
    first = x.sign() * ratio ** (p - 1)
    if not curved:
        return first.masked_fill(flat, 0), None
    second = (p - 1) * (ratio ** (p - 2) - ratio ** (2 * p - 2)) / y
    return first.masked_fill(flat, 0), second.masked_fill(flat, 0)


@register_rule(
    "LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3", curved=True
)
def norm(op: Operation) -> Formula:
    """The norm of any order, of all entries or along dimensions."""
    node = op.node
    saved, result = node._saved_self, node._saved_result
    order = node._saved_ord if node.name() == "LinalgVectorNormBackward0" else node._saved_p
    p = 2.0 if order is None else float(order)
    op.curved = p not in (0.0, 1.0) and not math.isinf(p)
    rank = saved.dim()
    dims, keepdim = reduced_dims(getattr(node, "_saved_dim", None), rank), getattr(node, "_saved_keepdim", False)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        y = spread(full(result), dims, keepdim, rank)
        first, second = _norm(saved.to(y.dtype), y, p, g is not None, dims)
        g = None if g is None else spread(g, dims, keepdim, rank)
        return (curve(first, second, g, None if h is None else spread(h, dims, keepdim, rank)),)

    return formula if op.curved else lambda h: formula(None, h)


@register_rule("DistBackward0", curved=True)
def dist(op: Operation) -> Formula:
    """The norm of a difference.

    Where one was broadcast, derivatives by all copies of an entry add up, the mixed ones ``-(p - 1) y_i y_k / y`` too.
    """
    node = op.node
    a, b, result, p = node._saved_self, node._saved_other, node._saved_result, float(node._saved_p)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        x, y = full(a) - full(b), full(result)
        first, second = _norm(x, y, p, g is not None, list(range(x.dim())))

        def of(shape: torch.Size) -> Tensor | None:
            if shape == x.shape:
                return curve(first, second, g, h)
            mixed = ((p - 1) / y).masked_fill(y == 0, 0)
            once = first.sum_to_size(shape)
            twice = None if second is None else (second + mixed * first**2).sum_to_size(shape) - mixed * once**2
            return curve(once, twice, g, h)

        return of(a.shape), of(b.shape)

    return formula


@register_rule("CdistBackward0", "EuclideanDistBackward0", "PdistBackward0", curved=True)
def distances(op: Operation) -> Formula:
    """Norms of the differences of all pairs of rows, in blocks of rows so that memory stays bounded."""
    node = op.node
    result, p = full(node._saved_result), float(getattr(node, "_saved_p", 2.0))
    of_one_set = node.name() == "PdistBackward0"
    a, b = (node._saved_self,) * 2 if of_one_set else (node._saved_x1, node._saved_x2)
    nothing = (None,) * len(op.needs)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        y = result
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
            x = full(a)[..., here, None, :] - full(b)[..., None, :, :]
            g_y, h_y = (None if t is None else t[..., here, :, None] for t in (g, h))
            total = curve(*_norm(x, y[..., here, :, None], p, g is not None, [-1]), g_y, h_y)
            if total is None:  # no curvature arrives, and none is made
                return nothing
            of_a.append(total.sum(-2))
            of_b = of_b + total.sum(-3)
        if of_one_set:
            return (torch.cat(of_a) + of_b,)
        return torch.cat(of_a, -2).sum_to_size(a.shape), of_b.sum_to_size(b.shape)

    return formula


@register_rule("VarBackward0", "StdBackward0", curved=True)
def spread_of_entries(op: Operation) -> Formula:
    """``v' = 2 (x - mean)/m``, ``v'' = 2 (1 - 1/n)/m`` with ``m = n - correction``; ``std' = (x - mean)/(m std)``."""
    return _variance(op, op.node.name() == "StdBackward0", False)


@register_rule("VarMeanBackward0", "StdMeanBackward0", curved=True, multi_output=True)
def spread_of_entries_and_mean(op: Operation) -> Formula:
    """The mean adds ``h / n^2``."""
    return _variance(op, op.node.name() == "StdMeanBackward0", True)


def _variance(op: Operation, root: bool, with_mean: bool) -> Formula:
    node = op.node
    saved, keepdim, correction = node._saved_self, node._saved_keepdim, node._saved_correction
    rank = saved.dim()
    dims = reduced_dims(node._saved_dim, rank)
    n = math.prod(saved.shape[d] for d in dims) if rank else 1
    m = max(n - (1 if correction is None else correction), 0)

    def by_entries(g: Tensor | None, h: Tensor | None) -> Tensor | None:
        x = full(saved)
        centered = x - x.mean(dims, keepdim=True)
        g, h = (None if t is None else spread(t, dims, keepdim, rank) for t in (g, h))
        if not root:
            return curve(
                centered * (2 / m),
                None if g is None else centered.new_full((), 2 * (1 - 1 / n) / m).expand(x.shape),
                g,
                h,
            )
        y = (centered.square().sum(dims, keepdim=True) / m).sqrt()
        first = (centered / (m * y)).masked_fill(y == 0, 0)
        second = None if g is None else (((1 - 1 / n) / m - first.square()) / y).masked_fill(y == 0, 0)
        return curve(first, second, g, h)

    def formula(g: Any, h: Any) -> Diagonals:
        if not with_mean:
            return (by_entries(g, h),)
        g_v = None if g is None else g[0]
        h_v, h_mean = (None, None) if h is None else h
        total = None if g_v is None and h_v is None else by_entries(g_v, h_v)
        if h_mean is None:
            return (total,)
        passed = (spread(h_mean, dims, keepdim, rank) / n**2).expand(saved.shape)
        return (passed if total is None else total + passed,)

    return formula


@register_rule("RenormBackward0", curved=True)
def renorm(op: Operation) -> Formula:
    """``y = s(n) x`` for the norm n of each slice, ``s = limit / (n + 1e-7)`` above the limit and 1 below.

    ``dy_j/dx_i = delta_ij s + x_j s' n_i`` and ``d2y_j/dx_i^2 = 2 delta_ij s' n_i + x_j (s'' n_i^2 + s' n_ii)``.
    """
    node = op.node
    saved, p, limit = node._saved_self, float(node._saved_p), float(node._saved_maxnorm)
    kept = reduced_dims(node._saved_dim, saved.dim())[0]
    dims = [d for d in range(saved.dim()) if d != kept]

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        x = full(saved)
        n = torch.linalg.vector_norm(x, p, dims, keepdim=True)
        n_i, n_ii = _norm(x, n, p, g is not None, dims)
        inverse = 1 / (n + 1e-7)
        inside = n <= limit
        s = (limit * inverse).masked_fill(inside, 1)
        s_1 = (-limit * inverse**2).masked_fill(inside, 0)
        s_2 = (2 * limit * inverse**3).masked_fill(inside, 0)
        total = None
        if h is not None:
            total = h * (s * s + 2 * s * s_1 * x * n_i) + (s_1 * n_i).square() * (x * x * h).sum(dims, keepdim=True)
        if g is not None:
            bend = s_2 * n_i * n_i if n_ii is None else s_2 * n_i * n_i + s_1 * n_ii
            made = 2 * g * s_1 * n_i + bend * (x * g).sum(dims, keepdim=True)
            total = made if total is None else total + made
        return (total,)

    return formula
