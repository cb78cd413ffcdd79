"""In-place operations on a part of a tensor: ``y[0] = x``, ``y[0].zero_()``, ``y[0] += x``, ``y[0] *= 2``.

All of them leave one kind of node, ``CopySlices``, which does not show the operation, and of which nothing is left
after backward. So the operation is recognised before backward, by what the node does to three probes:

- ones give the coefficients c of a linear operation;
- a numbering of the entries of y tells where each entry of x went;
- irregular numbers confirm both, since no other linear operation agrees on them.

If the result of a probe requires grad, the coefficients depend on a tensor of the graph, so the operation is curved, or
bilinear, and is refused. (A ``torch.autograd.Function`` that works in place on a part and is ``once_differentiable``
hides this.) Probing costs about three times the node's own backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule
from hesscale_lightning.curvature.rules.shape import carried

_ADVICE = "write it out of place, for example with torch.cat, torch.stack, torch.where or index_copy"


@register_rule("torch::autograd::CopySlices")
def copy_slices(op: Operation) -> Formula:
    """``h_y = c_y^2 h``, ``h_x = c_x^2 h[positions]``; if one number x filled a part, ``h_x`` sums h over it."""
    node, meta = op.node, op.node._input_metadata[0]
    shape, dtype, device = torch.Size(meta.shape), carried(meta.dtype), meta.device
    count = shape.numel()
    inputs, need_y, need_x = len(op.needs), op.needs[0], any(op.needs[1:])
    half = meta.dtype in HALF or (need_x and op.input_meta(1)[0] in HALF)
    tolerance = 0.02 if half else 1e-5

    def probe(values: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            results = node(values.view(shape).to(meta.dtype))
        results = [results] if isinstance(results, Tensor) else list(results or ())
        if len(results) > 2 or any(r is not None and r.requires_grad for r in results):
            raise op.unsupported(f"a part of a tensor was changed in place by a curved operation; {_ADVICE}")
        return [None if r is None else r.double() for r in (*results, None, None)[:2]]

    def agree(a: Tensor, b: Tensor) -> None:
        if not torch.allclose(a, b, rtol=tolerance, atol=0):
            raise op.unsupported(f"an operation in place on a part of a tensor mixes its entries; {_ADVICE}")

    numbers = torch.arange(count, dtype=torch.float64, device=device)
    irregular = ((numbers + 1) * ((math.sqrt(5) - 1) / 2)).frac() + 0.5
    c_y, c_x = probe(torch.ones_like(numbers))
    seen_y, seen_x = probe(irregular)

    changed: Tensor | None = None  # entries of y with a coefficient other than 1
    change: Tensor | None = None  # their squared coefficients
    filled: Tensor | None = None  # entries of y that one number x has filled
    positions: Tensor | None = None  # where in y each entry of x went
    factor: Tensor | None = None  # the squared coefficients of x, if not 1
    if c_y is not None and seen_y is not None:
        c_y = c_y.view(-1)
        agree(seen_y.view(-1), c_y * irregular)
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
                digits = probe((numbers / unit).floor() % base + 1)[1]
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
            h_x = h_x.sum_to_size(shape_x).to(dtype_x)  # x may have been broadcast
        return (h_y, h_x)[:inputs]

    return formula
