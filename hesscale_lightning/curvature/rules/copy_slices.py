"""In-place operations on a part of a tensor: ``y[0] = x``, ``y[0].zero_()``, ``y[0] += x``, ``y[0].exp_()``.

All of them leave one kind of node, ``CopySlices``, which does not show the operation, and of which nothing is left
after backward. So the operation is recognised before backward, by what the node does to probes:

- The usual cases, a copy into a regular part and a filling, by a numbering of the entries of y, which tells where each
  entry of x went. That costs one probe, a few times the node's own backward.
- Any other operation, by differentiating what the node does to a probe: ``r_j = sum_i v_i dy_i/dx_j`` is linear in v,
  so that its derivative by ``v_i`` is the coefficient of the one entry x_j that y_i is made of; and the saved tensors
  that it was computed from lead to x, so that its derivative by x, in turn differentiated by ``v_i``, is the second
  derivative. Irregular numbers confirm that each y_i is made of one entry of each x. That costs some ten probes and
  the memory of these derivatives.

Derivatives are taken by calling nodes, since autograd's engine would run the hooks of tensors on the way. What is
refused, when a loss is attached: operations that mix entries, such as ``y[0].cumsum_(0)``; curved ones that take one
tensor twice, ``y[0].addcmul_(x, x)``; and those whose gradient torch cannot differentiate. (A
``torch.autograd.Function`` that works in place on a part is taken by what its backward computes, as torch does.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hesscale_lightning.curvature.graph import AccumulateGrad, Node
from hesscale_lightning.curvature.operation import Operation, carried
from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

Edge = tuple[Node, int]

_ADVICE = "write it out of place, for example with torch.cat, torch.stack, torch.where or index_copy"
_MOST_NODES = 64  # of a formula of a gradient: more than any has, and little of a network


Formula = Callable[[Tensor | None, Tensor | None], Sequence[Tensor | None]]


def _recognised(op: Operation) -> tuple[bool, Formula]:
    """Whether there may be second derivatives, and the rule as a function of g and h; found out at every attach."""
    meta = op.node._input_metadata[0]
    count, need_x = torch.Size(meta.shape).numel(), any(op.needs[1:])
    fine = meta.dtype not in HALF and count < 2**24 and len(op.needs) < 3
    if fine and not (need_x and op.input_meta(1)[0] in HALF):
        numbers = torch.arange(1, count + 1, dtype=meta.dtype, device=meta.device)
        formula = (_regular_copy if need_x else _filling)(op, numbers)
        if formula is not None:
            return False, formula
    return _entry_by_entry(op)


@register_rule("torch::autograd::CopySlices", prepare=_recognised, curved=lambda op: bool(op.prepared[0]))
def copy_slices(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """``h_y = c_y^2 h + s_y g``, ``h_x = c_x^2 h + s_x g`` at the place where x went, summed if it went to several."""
    results: Sequence[Value] = _applied(op.prepared[1], g, h)
    return results


@opaque
def _applied(formula: Formula, g: Tensor | None, h: Tensor | None) -> Sequence[Tensor | None]:
    return formula(g, h)


# -- the usual cases -------------------------------------------------------------------------------------------------


def _probe(op: Operation, values: Tensor) -> list[Tensor | None] | None:
    """What the node makes of a gradient, for y and for x; None if its coefficients come from the graph."""
    meta = op.node._input_metadata[0]
    with torch.enable_grad():
        results = op.node(values.view(meta.shape).to(meta.dtype))
    results = [results] if isinstance(results, Tensor) else list(results or ())
    return None if any(r is not None and r.requires_grad for r in results) else [*results, None, None][:2]


def _filling(op: Operation, numbers: Tensor) -> Formula | None:
    """What has overwritten a part of y needs no curvature; None if y was not just overwritten."""
    probed = _probe(op, numbers)
    if probed is None or probed[0] is None:
        return None
    seen = probed[0].reshape(-1)
    overwritten = (seen != numbers).nonzero()[:, 0]
    if bool(seen[overwritten].any()):
        return None
    inputs = len(op.needs)

    def formula(g: Tensor | None, h: Tensor | None) -> Sequence[Tensor | None]:
        h_y = None if h is None else h.reshape(-1).index_fill(0, overwritten, 0).view(h.shape)
        return (h_y, None)[:inputs]

    return formula


def _regular_copy(op: Operation, numbers: Tensor) -> Formula | None:
    """A copy into, or a sum with, the part of y that has x's shape and some strides; None if it is something else."""
    probed = _probe(op, numbers)
    if probed is None:
        return None
    seen_y, seen_x = probed
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
        ones = _probe(op, torch.ones_like(numbers))
        if ones is None or ones[1] is None or not bool((ones[1] == 1).all()):
            return None
    else:
        numbers.as_strided(*part).zero_()
        if seen_y is None or not torch.equal(seen_y, numbers):
            return None
    need_y, shape, dtype = op.needs[0], op.input_shape(1), op.input_dtype(1)

    def formula(g: Tensor | None, h: Tensor | None) -> Sequence[Tensor | None]:
        if h is None:
            return None, None
        h_y = h.clone(memory_format=torch.contiguous_format) if need_y else None
        if h_y is not None and not summed:
            h_y.as_strided(*part).zero_()
        h = h.contiguous()
        size, strides, offset = part
        h_x = h.as_strided(size, strides, offset + int(h.storage_offset()))
        return h_y, h_x.sum_to_size(shape).to(dtype, copy=True)  # x may have been broadcast

    return formula


# -- any operation that works entry by entry -------------------------------------------------------------------------


class _UnknownError(Exception):
    """A derivative cannot be taken."""


def _entry_by_entry(op: Operation) -> tuple[bool, Formula]:
    meta = op.node._input_metadata[0]
    v = torch.ones(torch.Size(meta.shape), dtype=meta.dtype, device=meta.device, requires_grad=True)
    with torch.enable_grad():
        results = _results(op, v)
        try:
            partials = [_partials(op, v, r, k) if op.needs[k] else None for k, r in enumerate(results)]
        except _UnknownError as error:
            raise op.unsupported(f"a part of a tensor was changed in place by {error}; {_ADVICE}") from None
    mixed = op.needs.count(True) > 1 and any(r is not None and _leads_beyond(r, v) for r in results)
    curved = mixed or any(found is not None and found.second is not None for found in partials)

    def formula(g: Tensor | None, h: Tensor | None) -> Sequence[Tensor | None]:
        return [None if found is None else found.applied(g, h) for found in partials]

    return curved, formula


class _Partials(NamedTuple):
    """Derivatives of the entries of y by one input, squared and second.

    Attributes:
        square: For all entries, or for those of ``places``.
        second: Likewise; None if it is zero.
        places: Entries of y, and the entries of the input that they are made of; None where they are the same.
        shape: Of the input.
        dtype: Of its curvature.
    """

    square: Tensor
    second: Tensor | None
    places: tuple[Tensor, Tensor] | None
    shape: torch.Size
    dtype: torch.dtype

    def applied(self, g: Tensor | None, h: Tensor | None) -> Tensor | None:
        """``h_x``."""
        if self.places is not None:
            at, _ = self.places
            g, h = (None if t is None else t.reshape(-1)[at] for t in (g, h))
        result = None if h is None else self.square * h
        if g is not None and self.second is not None:
            result = self.second * g if result is None else result.addcmul_(self.second, g)
        if result is None or self.places is None:
            return result
        _, to = self.places
        return result.new_zeros(self.shape.numel()).index_add_(0, to, result).view(self.shape).to(self.dtype)


def _results(op: Operation, v: Tensor) -> list[Tensor | None]:
    """What the node makes of v, for each needed input, in that input's shape, as autograd's engine would have it."""
    results = op.node(v)
    results = [results] if isinstance(results, Tensor) else list(results or ())
    results += [None] * (len(op.needs) - len(results))
    return [
        r.sum_to_size(op.input_shape(k)) if need and r is not None else None
        for k, (need, r) in enumerate(zip(op.needs, results, strict=True))
    ]


def _edge(x: Tensor) -> Edge:
    edge = torch.autograd.graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


def _leads_beyond(r: Tensor, v: Tensor) -> bool:
    """Whether r was made of something else than v that requires grad."""
    probe, _ = _edge(v)
    todo: list[Node] = [r.grad_fn]
    seen: set[Node] = {None, probe}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node) is AccumulateGrad or len(seen) > _MOST_NODES:
            return True
        todo += [child for child, _ in node.next_functions]
    return False


def _partials(op: Operation, v: Tensor, r: Tensor | None, k: int) -> _Partials | None:
    if r is None or r.grad_fn is None:
        return None
    edges: list[Edge] = list(op.node.next_functions)
    own, probe = edges[k], _edge(v)
    half = v.dtype in HALF or r.dtype in HALF

    def by(edge: Edge, of: Tensor, weights: Tensor | None = None) -> Tensor | None:
        u = torch.ones_like(of) if weights is None else weights.view(of.shape).to(of.dtype)
        return _pulled(of, u, {probe, *edges}).get(edge)

    def by_v(of: Tensor, weights: Tensor | None = None) -> Tensor | None:
        found = by(probe, of, weights)
        return None if found is None else found.detach().double().reshape(-1)

    first = by_v(r)
    if first is None:
        return None
    slope, second = by(own, r), None
    if slope is not None and slope.grad_fn is not None:
        if edges.count(own) > 1:
            raise _UnknownError("a curved operation that takes one tensor twice")
        second = by_v(slope)
    columns = [(r, first)] if slope is None or second is None else [(r, first), (slope, second)]

    dtype, shape, dtype_x = carried(v.dtype), op.input_shape(k), op.input_dtype(k)
    square, second = (first * first).to(dtype), None if second is None else second.to(dtype)
    irregular = _irregular(r.numel(), v)
    if k == 0:
        if not all(_agree(by_v(of, irregular), values * irregular, half) for of, values in columns):
            raise _UnknownError("an operation that mixes its entries")
        return _Partials(square.view(v.shape), None if second is None else second.view(v.shape), None, shape, dtype_x)

    if not all(bool(values.isfinite().all()) for _, values in columns):
        raise _UnknownError("an operation with an infinite derivative")
    numbers = torch.arange(r.numel(), dtype=torch.float64, device=v.device)
    places = None  # for each entry of y, the entry of x that it is made of
    for of, values in columns:
        found = _places(values, partial(by_v, of), numbers, half)
        places = found if places is None else torch.where(first != 0, places, found)
    assert places is not None
    if not len(numbers) or all(_agree(by_v(of, irregular), values * irregular[places], half) for of, values in columns):
        at = (first != 0 if second is None else (first != 0) | (second != 0)).nonzero()[:, 0]
        return _Partials(square[at], None if second is None else second[at], (at, places[at]), shape, dtype_x)
    if second is not None:
        raise _UnknownError("an operation that mixes its entries")

    def gone(values: Tensor) -> Tensor:  # the other way round: several entries of x may have been added to one of y
        (result,) = [x for j, x in enumerate(_results(op, values.view(v.shape).to(v.dtype))) if j == k]
        assert result is not None
        return result.detach().double().reshape(-1)

    factors, numbers = r.detach().double().reshape(-1), torch.arange(v.numel(), dtype=torch.float64, device=v.device)
    places, irregular = _places(factors, gone, numbers, half), _irregular(v.numel(), v)
    if not _agree(gone(irregular), factors * irregular[places], half):
        raise _UnknownError("an operation that mixes its entries")
    everywhere = torch.arange(len(places), device=v.device)
    return _Partials((factors * factors).to(dtype), None, (places, everywhere), shape, dtype_x)


def _irregular(count: int, like: Tensor) -> Tensor:
    """Numbers between 1/2 and 3/2 of which no two are in a simple proportion."""
    n = torch.arange(1, count + 1, dtype=torch.float64, device=like.device)
    return (n * ((math.sqrt(5) - 1) / 2)).frac() + 0.5


def _places(factors: Tensor, of: Callable[[Tensor], Any], numbers: Tensor, half: bool) -> Tensor:
    """Which entry of what ``of`` is applied to each factor belongs to; anything where the factor is zero."""
    base = 2**6 if half else 2**20  # numbers that survive the tensors' precision
    places, unit = torch.zeros_like(factors, dtype=torch.long), 1
    while unit < len(numbers):
        digits = of((numbers / unit).floor() % base + 1)
        places += unit * ((digits / factors).round().nan_to_num(1, 1, 1).long() - 1)
        unit *= base
    return places.clamp_(0, max(len(numbers) - 1, 0))


def _agree(found: Tensor | None, expected: Tensor, half: bool) -> bool:
    return found is not None and torch.allclose(found, expected, rtol=0.02 if half else 1e-5, atol=0, equal_nan=True)


def _pulled(y: Tensor, u: Tensor, stops: Collection[Edge]) -> dict[Edge, Tensor]:
    """The gradients of ``(u * y).sum()`` that arrive at ``stops``, with a graph, as autograd's engine without hooks."""
    assert y.grad_fn is not None
    start = y.grad_fn, y.output_nr
    arrived: dict[Edge, Tensor] = {start: u}
    for node in [] if start in stops else _order(start[0], stops):
        grads = [arrived.pop((node, output), None) for output in range(len(node._input_metadata))]
        if all(grad is None for grad in grads):
            continue
        try:
            passed = node(*grads)
        except CheckpointError:
            raise
        except Exception as error:
            raise _UnknownError(f"an operation whose gradient cannot be differentiated ({error})") from error
        passed = [passed] if passed is None or isinstance(passed, Tensor) else passed
        for edge, grad in zip(node.next_functions, passed):  # noqa: B905 (it may return fewer)
            child, output = edge
            if child is None or grad is None:
                continue
            meta = child.variable if type(child) is AccumulateGrad else child._input_metadata[output]
            grad = grad.sum_to_size(meta.shape).to(meta.dtype)
            arrived[edge] = arrived[edge] + grad if edge in arrived else grad
    return {edge: grad for edge, grad in arrived.items() if edge in stops}


def _order(root: Node, stops: Collection[Edge]) -> list[Node]:
    """The nodes from ``root`` as far as ``stops``, each before all that it leads to."""
    finished: list[Node] = []
    opened: set[Node] = set()
    done: set[Node] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        if node in opened:
            stack.pop()
            if node not in done:
                done.add(node)
                finished.append(node)
            continue
        opened.add(node)
        if type(node) is AccumulateGrad or len(opened) > _MOST_NODES:
            raise _UnknownError("an operation whose derivatives cannot be found in the graph")
        stack += [
            edge[0]
            for edge in node.next_functions
            if edge[0] is not None and edge not in stops and edge[0] not in opened
        ]
    return finished[::-1]
