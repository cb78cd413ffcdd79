"""What operations along the last dimension do to derivatives, where they are joined; see :mod:`..rows`.

These complement the operations' ordinary rules, which apply where they stand alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full
from hesscale_lightning.curvature.registry import Operation
from hesscale_lightning.curvature.rows import (
    RowOperation,
    Taylor,
    Terms,
    plus,
    row_wise,
    scaled,
    summed,
    through_log_softmax,
    through_logsumexp,
    through_softmax,
    times,
)
from hesscale_lightning.curvature.rules.shape import carried
from hesscale_lightning.curvature.straight_line import Factor, Symbol

_WRAP = 2**64  # a node shows a negative dimension as an unsigned number


def _is_last(dim: int, rank: int) -> bool:
    dim = dim - _WRAP if dim > _WRAP >> 1 else dim
    return rank > 0 and dim % rank == rank - 1


def _reduces_last(op: Operation) -> bool:
    dims = op.node._saved_dim
    rank = len(op.input_shape(0))
    return dims is not None and len(dims) == 1 and _is_last(dims[0], rank)


@row_wise("SumBackward1", "MeanBackward1")
def total(op: Operation) -> RowOperation | None:
    """``y = w sum_j x_j``."""
    if not _reduces_last(op):
        return None
    width = op.input_shape(0)[-1]
    weight = 1 / width if op.node.name() == "MeanBackward1" else 1.0

    def apply(x: Taylor) -> Taylor:
        return Taylor(summed(x.first, width, weight), summed(x.second, width, weight))

    return RowOperation(apply, not op.node._saved_keepdim, True)


@row_wise("LogsumexpBackward0")
def logsumexp(op: Operation) -> RowOperation | None:
    """``y = log sum_j exp x_j``."""
    if not _reduces_last(op):
        return None
    x, y, keepdim = op.node._saved_self, op.node._saved_result, op.node._saved_keepdim
    width = x.shape[-1]

    def probabilities() -> tuple[Tensor]:
        total = full(y) if keepdim else full(y).unsqueeze(-1)
        return (torch.exp(full(x) - total),)

    return RowOperation(lambda u, p: through_logsumexp(u, p, width), not keepdim, True, probabilities)


@row_wise("SoftmaxBackward0", "LogSoftmaxBackward0")
def softmax(op: Operation) -> RowOperation | None:
    """The probabilities ``softmax(x)``, or their logarithms."""
    result = op.node._saved_result
    if not _is_last(op.node._saved_dim, result.dim()):
        return None
    width, plain = result.shape[-1], op.node.name() == "SoftmaxBackward0"

    def probabilities() -> tuple[Tensor]:
        return (full(result) if plain else full(result).exp(),)

    through = through_softmax if plain else through_log_softmax
    return RowOperation(lambda u, p: through(u, p, width), None, True, probabilities)


def _picked(x: Terms, index: Symbol, mask: Symbol, width: int) -> Terms:
    """Row ``index`` of ``x``, alike for all rows."""
    total: Factor | None = None if x.diagonal is None else x.diagonal * mask
    for b, c in x.products:
        if isinstance(b, Symbol) and b.last == width > 1:
            b = b.pick(index, width)
        total = b * c if total is None else total + b * c
    return Terms(None, () if total is None else ((1.0, total),))


@row_wise("GatherBackward0", "MaxBackward0", "MinBackward0")
def pick(op: Operation) -> RowOperation | None:
    """``y = x_i`` with one ``i`` for each row: a gathered class, or the position of the extremum."""
    node = op.node
    shape = op.input_shape(0)
    if not _is_last(node._saved_dim, len(shape)):
        return None
    gathers = node.name() == "GatherBackward0"
    index = node._saved_index if gathers else node._saved_indices
    flat = False if gathers else not node._saved_keepdim
    if gathers and (index.shape[-1] != 1 or index.shape[:-1] != shape[:-1]):
        return None
    width, dtype = shape[-1], carried(op.input_meta(0)[0])

    def values() -> tuple[Tensor, Tensor]:
        rows = index.unsqueeze(-1) if flat else index
        mask = torch.zeros((*rows.shape[:-1], width), dtype=dtype, device=rows.device)
        return rows, mask.scatter_(-1, rows, 1.0)

    def apply(x: Taylor, rows: Symbol, mask: Symbol) -> Taylor:
        return Taylor(_picked(x.first, rows, mask, width), _picked(x.second, rows, mask, width))

    return RowOperation(apply, flat, True, values)


@row_wise("VarBackward0", "StdBackward0")
def variance(op: Operation) -> RowOperation | None:
    """``y = sum_j (x_j - mean)^2 / m``, ``m = n - correction``, or its root."""
    node = op.node
    if not _reduces_last(op):
        return None
    x, keepdim = node._saved_self, node._saved_keepdim
    width = x.shape[-1]
    correction = 1 if node._saved_correction is None else node._saved_correction
    weight = 2 / (width - correction)
    root = node._saved_result if node.name() == "StdBackward0" else None

    def values() -> tuple[Tensor | float, ...]:
        centered = full(x) - full(x).mean(-1, keepdim=True)
        if root is None:
            return centered * weight, weight
        half = 0.5 / (full(root) if keepdim else full(root).unsqueeze(-1))
        return centered * weight, weight, half, -2 * half**3  # 1 / (2 s) and -1 / (4 s^3)

    def apply(u: Taylor, slopes: Symbol, weight: Factor, *of_root: Symbol) -> Taylor:
        first, second = (
            plus(t, scaled(summed(t, width, 1 / width), -1.0)) for t in (u.first, u.second)
        )  # the derivatives of x - mean
        y1 = summed(first, width, slopes)
        y2 = plus(summed(second, width, slopes), summed(times(first, first), width, weight))
        if not of_root:
            return Taylor(y1, y2)
        half, curve = of_root
        return Taylor(scaled(y1, half), plus(scaled(y2, half), scaled(times(y1, y1), curve)))

    return RowOperation(apply, not keepdim, True, values)


@row_wise("UnsqueezeBackward0")
def unsqueeze(op: Operation) -> RowOperation | None:
    """Gives a flat tensor its last dimension back."""
    rank = len(op.output_shape())
    return RowOperation(lambda x: x, False, False) if _is_last(op.node._saved_dim, rank) else None


@row_wise("SqueezeBackward1")
def squeeze(op: Operation) -> RowOperation | None:
    """Takes a last dimension of size one away."""
    shape = op.input_shape(0)
    if not _is_last(op.node._saved_dim, len(shape)) or shape[-1] != 1:
        return None
    return RowOperation(lambda x: x, True, False)


@row_wise("ExpandBackward0")
def expand(op: Operation) -> RowOperation | None:
    """Repeats a row's number, or rows."""
    before, after = op.input_shape(0), op.output_shape()
    if len(before) != len(after):
        return None
    return RowOperation(lambda x: x, None, False)


@row_wise("WhereBackward0", "MaskedFillBackward0")
def mask(op: Operation) -> RowOperation | None:
    """``y = x`` where a mask lets it through, else what is fixed."""
    if True in op.needs[1:] or op.input_shape(0) != op.output_shape():
        return None
    node, dtype = op.node, carried(op.input_meta(0)[0])
    opens = node.name() == "WhereBackward0"
    saved = node._saved_condition if opens else node._saved_mask

    def apply(x: Taylor, passed: Symbol) -> Taylor:
        return Taylor(scaled(x.first, passed), scaled(x.second, passed))

    return RowOperation(apply, None, False, lambda: ((saved if opens else ~saved).to(dtype),))
