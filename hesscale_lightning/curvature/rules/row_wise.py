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

    def apply(u: Taylor) -> Taylor:
        total = full(y) if keepdim else full(y).unsqueeze(-1)
        return through_logsumexp(u, torch.exp(full(x) - total), width)

    return RowOperation(apply, not keepdim, True)


@row_wise("SoftmaxBackward0", "LogSoftmaxBackward0")
def softmax(op: Operation) -> RowOperation | None:
    """The probabilities ``softmax(x)``, or their logarithms."""
    result = op.node._saved_result
    if not _is_last(op.node._saved_dim, result.dim()):
        return None
    width, plain = result.shape[-1], op.node.name() == "SoftmaxBackward0"

    def apply(u: Taylor) -> Taylor:
        p = full(result)
        return through_softmax(u, p, width) if plain else through_log_softmax(u, p.exp(), width)

    return RowOperation(apply, None, True)


def _picked(x: Terms, index: Tensor, width: int, dtype: torch.dtype) -> Terms:
    """Row ``index`` of ``x``, alike for all rows."""
    parts: list[Tensor] = []
    if x.diagonal is not None:
        shape = (*index.shape[:-1], width)
        mask = torch.zeros(shape, dtype=dtype, device=index.device).scatter_(-1, index, 1.0)
        parts.append(x.diagonal * mask)
    for b, c in x.products:
        if isinstance(b, Tensor) and b.dim() and b.shape[-1] == width:
            b = b.expand(*index.shape[:-1], width).gather(-1, index)
        parts.append(b * c)  # type: ignore[arg-type]
    return Terms(None, ((1.0, sum(parts[1:], parts[0])),) if parts else ())


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

    def apply(x: Taylor) -> Taylor:
        rows = index.unsqueeze(-1) if flat else index
        return Taylor(_picked(x.first, rows, width, dtype), _picked(x.second, rows, width, dtype))

    return RowOperation(apply, flat, True)


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

    def apply(u: Taylor) -> Taylor:
        values = full(x)
        centered = values - values.mean(-1, keepdim=True)
        first, second = (
            plus(t, scaled(summed(t, width, 1 / width), -1.0)) for t in (u.first, u.second)
        )  # the derivatives of x - mean
        y1 = summed(first, width, centered * weight)
        y2 = plus(summed(second, width, centered * weight), summed(times(first, first), width, weight))
        if root is None:
            return Taylor(y1, y2)
        s = full(root) if keepdim else full(root).unsqueeze(-1)
        return Taylor(scaled(y1, 0.5 / s), plus(scaled(y2, 0.5 / s), scaled(times(y1, y1), -0.25 / s**3)))

    return RowOperation(apply, not keepdim, True)


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
