"""What operations along the last dimension do to derivatives, where they are joined; see :mod:`..rows`.

These complement the operations' ordinary rules, which apply where they stand alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.rows import (
    RowOperation,
    Taylor,
    Terms,
    is_number,
    last,
    plus,
    row_wise,
    scaled,
    summed,
    through_log_softmax,
    through_logsumexp,
    through_softmax,
    times,
)
from hesscale_lightning.curvature.values import Value, opaque


def _is_last(dim: int, rank: int) -> bool:
    return rank > 0 and dim % rank == rank - 1


def _reduces_last(op: Operation) -> bool:
    dims = op.number("dim")
    rank = len(op.input_shape(0))
    return dims is not None and len(dims) == 1 and _is_last(dims[0], rank)


@row_wise("SumBackward1", "MeanBackward1")
def total(op: Operation) -> RowOperation | None:
    """``y = w sum_j x_j``."""
    if not _reduces_last(op):
        return None
    width = op.input_shape(0)[-1]
    weight = 1 / width if op.name == "MeanBackward1" else 1.0

    def apply(x: Taylor) -> Taylor:
        return Taylor(summed(x.first, width, weight), summed(x.second, width, weight))

    return RowOperation(apply, not op.number("keepdim"), True)


@row_wise("LogsumexpBackward0")
def logsumexp(op: Operation) -> RowOperation | None:
    """``y = log sum_j exp x_j``."""
    if not _reduces_last(op):
        return None
    width, keepdim = op.input_shape(0)[-1], op.number("keepdim")

    def apply(u: Taylor) -> Taylor:
        total = op.output("result")
        p = (op.input(0, "self") - (total if keepdim else total.unsqueeze(-1))).exp()
        return through_logsumexp(u, p, width)

    return RowOperation(apply, not keepdim, True)


@row_wise("SoftmaxBackward0", "LogSoftmaxBackward0")
def softmax(op: Operation) -> RowOperation | None:
    """The probabilities ``softmax(x)``, or their logarithms."""
    shape = op.output_shape()
    if not _is_last(op.number("dim"), len(shape)):
        return None
    width = shape[-1]
    if op.name == "SoftmaxBackward0":
        return RowOperation(lambda u: through_softmax(u, op.output("result"), width), None, True)
    return RowOperation(lambda u: through_log_softmax(u, op.output("result").exp(), width), None, True)


def _picked(x: Terms, index: Value, mask: Value, width: int) -> Terms:
    """Row ``index`` of ``x``, alike for all rows."""
    total: Value = None if x.diagonal is None else x.diagonal * mask
    for b, c in x.products:
        if not is_number(b) and last(b) == width > 1:
            b = b.expand(*index.shape[:-1], width).gather(-1, index)
        total = b * c if total is None else total + b * c
    return Terms(None, () if total is None else ((1.0, total),))


@opaque
def _one_hot(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros((*index.shape[:-1], width), dtype=dtype, device=index.device).scatter_(-1, index, 1.0)


@row_wise("GatherBackward0", "MaxBackward0", "MinBackward0")
def pick(op: Operation) -> RowOperation | None:
    """``y = x_i`` with one ``i`` for each row: a gathered class, or the position of the extremum."""
    shape = op.input_shape(0)
    if not _is_last(op.number("dim"), len(shape)):
        return None
    gathers = op.name == "GatherBackward0"
    flat = False if gathers else not op.number("keepdim")
    if gathers and op.output_shape() != (*shape[:-1], 1):
        return None
    width, dtype = shape[-1], op.input_dtype(0)

    def apply(x: Taylor) -> Taylor:
        index = op.tensor("index" if gathers else "indices")
        index = index.unsqueeze(-1) if flat else index
        mask = _one_hot(index, width, dtype)
        return Taylor(_picked(x.first, index, mask, width), _picked(x.second, index, mask, width))

    return RowOperation(apply, flat, True)


@row_wise("VarBackward0", "StdBackward0")
def variance(op: Operation) -> RowOperation | None:
    """``y = sum_j (x_j - mean)^2 / m``, ``m = n - correction``, or its root."""
    if not _reduces_last(op):
        return None
    keepdim, correction = op.number("keepdim"), op.number("correction")
    width = op.input_shape(0)[-1]
    weight = 2 / (width - (1 if correction is None else correction))

    def apply(u: Taylor) -> Taylor:
        x = op.input(0, "self")
        first, second = (
            plus(t, scaled(summed(t, width, 1 / width), -1.0)) for t in (u.first, u.second)
        )  # the derivatives of x - mean
        slopes = (x - x.mean(-1, keepdim=True)) * weight
        y1 = summed(first, width, slopes)
        y2 = plus(summed(second, width, slopes), summed(times(first, first), width, weight))
        if op.name == "VarBackward0":
            return Taylor(y1, y2)
        y = op.output("result") if keepdim else op.output("result").unsqueeze(-1)
        half = 0.5 / y
        return Taylor(scaled(y1, half), plus(scaled(y2, half), scaled(times(y1, y1), half**3 * -2.0)))

    return RowOperation(apply, not keepdim, True)


@row_wise("UnsqueezeBackward0")
def unsqueeze(op: Operation) -> RowOperation | None:
    """Gives a flat tensor its last dimension back."""
    rank = len(op.output_shape())
    return RowOperation(lambda x: x, False, False) if _is_last(op.number("dim"), rank) else None


@row_wise("SqueezeBackward1")
def squeeze(op: Operation) -> RowOperation | None:
    """Takes a last dimension of size one away."""
    shape = op.input_shape(0)
    if not _is_last(op.number("dim"), len(shape)) or shape[-1] != 1:
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
    dtype = op.input_dtype(0)

    def apply(x: Taylor) -> Taylor:
        opens = op.tensor("condition") if op.name == "WhereBackward0" else ~op.tensor("mask")
        passed = opens.to(dtype)
        return Taylor(scaled(x.first, passed), scaled(x.second, passed))

    return RowOperation(apply, None, False)
