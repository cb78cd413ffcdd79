"""Operations that pick entries by value: maxima, medians, sorting.

A picked entry has the coefficient 1. Where autograd distributes the gradient among n entries that are tied, they have
the coefficient 1/n, and its square counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value

_aten = torch.ops.aten
_value_selecting_reduction_backward = _aten.value_selecting_reduction_backward.default
_cummaxmin_backward = _aten.cummaxmin_backward.default


@register_rule(
    "KthvalueBackward0", "MaxBackward0", "MedianBackward1", "MinBackward0", "ModeBackward0", "NanmedianBackward1",
    "SortBackward0", "SortBackward1", "TopkBackward0",
)  # fmt: skip
def pick_along_dim(op: Operation, h: Value) -> Value:
    """One entry for each output, whose index was saved; ties are broken."""
    shape = op.number("self_sym_sizes")
    kept = len(shape) == len(op.output_shape())
    return _value_selecting_reduction_backward(h, op.number("dim"), op.tensor("indices"), shape, kept)


@register_rule("CummaxBackward0", "CumminBackward0")
def running_extremum(op: Operation, h: Value) -> Value:
    """An entry that is the extremum of several outputs sums them."""
    return _cummaxmin_backward(h, h, op.tensor("indices"), op.number("dim"))


@register_rule("MaxBackward1", "MedianBackward0", "MinBackward1", "NanmedianBackward0")
def pick_of_all(op: Operation, h: Value) -> Value:
    """The n tied entries have the coefficient 1/n."""
    return _shared_by_tied(op, h, op.output("result"), ())


@register_rule("AmaxBackward0", "AminBackward0")
def extremum(op: Operation, h: Value) -> Value:
    """As :func:`pick_of_all`, along several dimensions."""
    return _shared_by_tied(op, h, op.output("result"), _with_ones(op.input_shape(0), op.number("dim")))


@register_rule("AminmaxBackward0", multi_output=True)
def aminmax(op: Operation, h: Sequence[Value]) -> Value:
    """Both of :func:`extremum`."""
    dim = op.number("dim")
    shape = _with_ones(op.input_shape(0), () if dim is None else (dim,))
    return _shared_by_tied(op, h[0], op.tensor("min"), shape) + _shared_by_tied(op, h[1], op.tensor("max"), shape)


def _with_ones(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """``shape`` with ones for ``dims``, which may count from the end; no dims are all."""
    return tuple([1 if not dims or d in dims or d - len(shape) in dims else n for d, n in enumerate(shape)])


def _shared_by_tied(op: Operation, h: Value, y: Value, shape: tuple[int, ...]) -> Value:
    """``h / n^2`` for the n entries that equal their extremum y; y and h are spread from ``shape``."""
    tied = (op.input(0, "self") == y.reshape(shape)).to(op.input_dtype(0))
    n = tied.sum_to_size(shape)
    return tied * (h.reshape(shape) / (n * n))
