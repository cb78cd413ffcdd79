"""In-place operations on a part of a tensor: ``y[0] = x``, ``y[0].zero_()``, ``y[0] += x``, ``y[0] *= 2``.

All of them leave one kind of node, ``CopySlices``, which does not show the operation, and of which nothing is left
after backward. So the operation is recognised before backward, by what the node does to probes: a numbering of the
entries of y tells where each entry of x went, ones give the coefficients of a linear operation, and irregular numbers
confirm both, since no other linear operation agrees on them. If the result of a probe requires grad, the coefficients
depend on a tensor of the graph, so the operation is curved, or bilinear, and is refused. (A ``torch.autograd.Function``
that works in place on a part and is ``once_differentiable`` hides this.)

The usual cases, a copy into a regular part and a filling, cost one probe, a few times the node's own backward; the
others cost ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation, carried
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

Diagonals = Sequence[Tensor | None]
Formula = Callable[[Tensor], Diagonals]
Probe = Callable[[Tensor], list[Tensor | None]]  # what the node makes of a gradient, for y and for x

_ADVICE = "write it out of place, for example with torch.cat, torch.stack, torch.where or index_copy"


def recognised(op: Operation) -> Formula:
    """What the operation does, as a function of h; found out anew at every attach."""
    node, meta = op.node, op.node._input_metadata[0]
    shape = torch.Size(meta.shape)

    def probe(values: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            results = node(values.view(shape).to(meta.dtype))
        results = [results] if isinstance(results, Tensor) else list(results or ())
        if len(results) > 2 or any(r is not None and r.requires_grad for r in results):
            raise op.unsupported(f"a part of a tensor was changed in place by a curved operation; {_ADVICE}")
        return [*results, None, None][:2]

    formula = None
    need_x = any(op.needs[1:])
    if meta.dtype not in HALF and not (need_x and op.input_meta(1)[0] in HALF) and shape.numel() < 2**24:
        numbers = torch.arange(1, shape.numel() + 1, dtype=meta.dtype, device=meta.device)
        formula = (_regular_copy if need_x else _filling)(op, probe, numbers)
    return formula or _linear(op, probe)


@register_rule("torch::autograd::CopySlices", prepare=recognised)
def copy_slices(op: Operation, h: Value) -> Sequence[Value]:
    """``h_y = c_y^2 h``, ``h_x = c_x^2 h[positions]``; if one number x filled a part, ``h_x`` sums h over it."""
    made: Sequence[Value] = _applied(op.prepared, h)
    return made


@opaque
def _applied(formula: Formula, h: Tensor) -> Diagonals:
    return formula(h)


def _filling(op: Operation, probe: Probe, numbers: Tensor) -> Formula | None:
    """What has overwritten a part of y needs no curvature; None if y was not just overwritten."""
    seen, inputs = probe(numbers)[0], len(op.needs)
    if seen is None:
        return None
    shape, seen = seen.shape, seen.reshape(-1)
    overwritten = (seen != numbers).nonzero()[:, 0]
    if bool(seen[overwritten].any()):
        return None
    return lambda h: (h.reshape(-1).index_fill(0, overwritten, 0).view(shape), None)[:inputs]


def _regular_copy(op: Operation, probe: Probe, numbers: Tensor) -> Formula | None:
    """A copy into, or a sum with, the part of y that has x's shape and some strides; None if it is something else."""
    seen_y, seen_x = probe(numbers)
    if seen_x is None or seen_x.numel() == 0:
        return None
    corners = torch.zeros(seen_x.ndim + 1, seen_x.ndim, dtype=torch.long)  # the first entry, and its neighbours
    for d, size in enumerate(seen_x.shape):
        corners[d + 1, d] = min(1, size - 1)
    first, *neighbours = seen_x[tuple(corners.t())].view(-1).long().tolist() if seen_x.ndim else [int(seen_x)]
    part = seen_x.shape, [n - first for n in neighbours], first - 1
    last = part[2] + sum((size - 1) * stride for size, stride in zip(part[0], part[1], strict=True))
    if min(part[1], default=0) < 0 or not 0 <= part[2] <= last < len(numbers):
        return None
    if not torch.equal(seen_x, numbers.as_strided(*part).to(seen_x.dtype)):
        return None
    numbers = numbers.view(op.node._input_metadata[0].shape)
    summed = seen_y is None or torch.equal(seen_y, numbers)
    if summed:  # the numbers of an x with a coefficient would be those of other entries
        ones = probe(torch.ones_like(numbers))[1]
        if ones is None or not bool((ones == 1).all()):
            return None
    else:
        numbers.as_strided(*part).zero_()
        if seen_y is None or not torch.equal(seen_y, numbers):
            return None
    need_y = op.needs[0]
    dtype, shape = carried(op.input_meta(1)[0]), op.input_shape(1)

    def formula(h: Tensor) -> Diagonals:
        h_y = h if need_y else None
        h = h.contiguous()
        if need_y and not summed:
            h_y = h.clone()
            h_y.as_strided(*part).zero_()
        size, strides, offset = part
        h_x = h.as_strided(size, strides, offset + int(h.storage_offset()))
        return h_y, h_x.sum_to_size(shape).to(dtype)  # x may have been broadcast

    return formula


def _linear(op: Operation, probe: Probe) -> Formula:
    """Any copy, filling or linear operation whose coefficients are constants, or the error that it is none."""
    meta = op.node._input_metadata[0]
    shape, dtype, device = torch.Size(meta.shape), carried(meta.dtype), meta.device
    count = shape.numel()
    inputs, need_y, need_x = len(op.needs), op.needs[0], any(op.needs[1:])
    half = meta.dtype in HALF or (need_x and op.input_meta(1)[0] in HALF)
    tolerance = 0.02 if half else 1e-5

    def agree(a: Tensor, b: Tensor) -> None:
        if not torch.allclose(a, b, rtol=tolerance, atol=0):
            raise op.unsupported(f"an operation in place on a part of a tensor mixes its entries; {_ADVICE}")

    def seen(values: Tensor) -> list[Tensor | None]:
        return [None if r is None else r.double() for r in probe(values)]

    numbers = torch.arange(count, dtype=torch.float64, device=device)
    irregular = ((numbers + 1) * ((math.sqrt(5) - 1) / 2)).frac() + 0.5
    c_y, c_x = seen(torch.ones_like(numbers))
    seen_y, seen_x = seen(irregular)

    changed: Tensor | None = None  # entries of y with a coefficient other than 1
    change: Tensor | None = None  # their squared coefficients
    filled: Tensor | None = None  # entries of y that one number x has filled
    positions: Tensor | None = None  # where in y each entry of x went
    factor: Tensor | None = None  # the squared coefficients of x, if not 1
    if c_y is not None and seen_y is not None:
        c_y = c_y.reshape(-1)
        agree(seen_y.reshape(-1), c_y * irregular)
        changed = (c_y != 1).nonzero()[:, 0]
        change = c_y[changed].square().to(dtype)
    if need_x and c_x is not None and seen_x is not None:
        dtype_x, shape_x = carried(op.input_meta(1)[0]), op.input_shape(1)
        if c_x.numel() == 1 and c_x.item() > 1:
            filled = changed if c_x.item() < count else numbers.long()
            if filled is None:
                raise op.unsupported(
                    "one number of the graph has filled a part of a constant tensor, and which part cannot be known; "
                    "expand the number to the shape of the part first: y[i] = x.expand(n)"
                )
            agree(seen_x, irregular[filled].sum().view_as(seen_x))
        else:
            base = 2**6 if half else 2**20  # numbers that survive the tensors' precision
            positions, unit = torch.zeros_like(c_x, dtype=torch.long), 1
            while unit < count:
                digits = seen((numbers / unit).floor() % base + 1)[1]
                assert digits is not None
                positions += unit * ((digits / c_x).round().nan_to_num(1).long() - 1)
                unit *= base
            positions.clamp_(0, count - 1)
            agree(seen_x, c_x * irregular[positions])
            factor = None if bool((c_x == 1).all()) else c_x.square().to(dtype)

    def formula(h: Tensor) -> Diagonals:
        h = h.reshape(-1)
        h_y = h_x = None
        if need_y and changed is not None and change is not None:
            h_y = h.index_copy(0, changed, h[changed] * change).view(shape)
        if filled is not None:
            h_x = h[filled].sum().view(shape_x).to(dtype_x)
        elif positions is not None:
            h_x = h[positions] if factor is None else h[positions] * factor
            h_x = h_x.sum_to_size(shape_x).to(dtype_x)
        return (h_y, h_x)[:inputs]

    return formula
