"""Every differentiable operator that torch can list, as one small graph each, and two dense references for it."""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_unflatten

from hesscale_lightning.curvature.graph import AccumulateGrad

# torch's own test suite wants this package for a base class of tests, which the list of operators makes no use of.
if "expecttest" not in sys.modules:
    try:
        import expecttest  # noqa: F401
    except ImportError:
        _stub = types.ModuleType("expecttest")
        _stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = _stub

_default = torch.get_default_dtype()
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.opinfo.core import OpInfo  # noqa: E402

torch.set_default_dtype(_default)

#: Entries of inputs and outputs together beyond which another sample is tried: the references visit each.
SMALL = 150


@dataclass(frozen=True)
class Sample:
    """One use of an operator.

    Attributes:
        function: Of the differentiable inputs alone; returns its real floating outputs that depend on them. Random
            operators give the same result at every call.
        inputs: Ready leaves in float64.
    """

    function: Callable[..., list[Tensor]]
    inputs: list[Tensor]

    def fresh(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.inputs]

    def size(self) -> int:
        return sum(x.numel() for x in self.inputs) + sum(y.numel() for y in self.function(*self.fresh()))


def operators() -> dict[str, OpInfo]:
    """The operators with a derivative in float64, by a name that is unique."""
    return {op.formatted_name: op for op in op_db if op.supports_autograd and _differentiable(op)}


def _differentiable(op: OpInfo) -> bool:
    return torch.float64 in op.supported_backward_dtypes("cpu")


def small_samples(op: OpInfo, inplace: bool = False, limit: int = 24) -> list[Sample]:
    """The small ones of the first uses of ``op`` with differentiable inputs and outputs; if none is, a large one."""
    if op.formatted_name in _OWN:
        return [_own(op.formatted_name)]
    found: list[Sample] = []
    for sample in islice(_samples(op, inplace), limit):
        if sample.size() <= SMALL:
            found.append(sample)
    return found or list(islice(_samples(op, inplace), 1))


#: Operators that the database has only large samples of.
_OWN: dict[str, Callable[..., Tensor]] = {
    "kron": lambda a, b: torch.kron(a, b),
    "slice_scatter": lambda a, b: torch.slice_scatter(a, b, 1, 1, 3, 2),
    "sort": lambda a: torch.sort(a, 1)[0],
    "msort": lambda a: torch.msort(a),
    "nn_functional_adaptive_avg_pool3d": lambda a: torch.nn.functional.adaptive_avg_pool3d(a, (2, 1, 2)),
}
_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "kron": ((2, 3), (3, 2)),
    "slice_scatter": ((2, 3), (2, 1)),
    "sort": ((3, 4),),
    "msort": ((4, 3),),
    "nn_functional_adaptive_avg_pool3d": ((2, 3, 2, 3),),
}


def _own(name: str) -> Sample:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in _SHAPES[name]]
    return Sample(lambda *given: [_OWN[name](*given)], inputs)


def _samples(op: OpInfo, inplace: bool) -> Iterator[Sample]:
    variant = op.get_inplace() if inplace else op.get_op()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for sample in islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), 100):
            if inplace and sample.broadcasts_input:
                continue
            made = _sample(op, variant, sample, inplace)
            try:
                outputs = made.function(*made.fresh()) if made.inputs else []
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue  # torch has no derivative for this use
            if outputs and sum(y.numel() for y in outputs):
                yield made


def _sample(op: OpInfo, variant: Any, sample: Any, inplace: bool) -> Sample:
    arguments, layout = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [k for k, x in enumerate(arguments) if _wanted(x)]

    def function(*inputs: Tensor) -> list[Tensor]:
        given = list(arguments)
        for place, x in zip(places, inputs, strict=True):
            given[place] = x
        first, args, kwargs = tree_unflatten(given, layout)
        if inplace:
            first = first.clone()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = op.gradcheck_wrapper(variant, first, *args, **kwargs)
            y = sample.output_process_fn_grad(y)
        return [z for z in map(_real, tree_flatten(y)[0]) if z is not None]

    return Sample(function, [arguments[place].detach().clone() for place in places])


def _wanted(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.dtype is torch.float64 and x.layout is torch.strided


def _real(y: Any) -> Tensor | None:
    if not isinstance(y, Tensor) or not y.requires_grad:
        return None
    if y.layout is not torch.strided:
        y = y.to_dense()
    if y.is_complex():
        return torch.view_as_real(y.resolve_conj())
    return y if y.is_floating_point() else None


# -- references


def node_by_node(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The recursion itself with each node's dense derivatives: what an engine without a rule of its own would do.

    Where the operator is of several nodes, each passes on only the diagonal of what arrives, so that the dense
    derivatives of the whole are not what is asked for. ``loss`` ends in the oracle's ``Probe``.
    """
    probe = loss.grad_fn
    order = _order(probe)
    place = {node: k for k, node in enumerate(order)}
    grads: dict[Any, Tensor] = {}
    curvature: dict[Any, Tensor] = {}

    def add(to: dict[Any, Tensor], edge: Any, x: Tensor | None) -> None:
        if x is not None:
            to[edge] = x if edge not in to else to[edge] + x

    for k, (g, h) in enumerate(zip(probe.g, probe.h, strict=True)):
        edge = probe.next_functions[k]
        add(grads, edge, g)
        add(curvature, edge, h)
    for node in order[1:]:
        if type(node) is AccumulateGrad:
            continue
        meta = node._input_metadata
        none = [torch.zeros(tuple(m.shape), dtype=m.dtype) for m in meta]
        g = [grads.get((node, k), none[k]) for k in range(len(meta))]
        h = [curvature.get((node, k), none[k]) for k in range(len(meta))]
        edges = list(node.next_functions)
        rows = [torch.zeros(_shape(edge), dtype=torch.float64) if edge[0] in place else None for edge in edges]
        for k, h_k in enumerate(h):
            for j in range(h_k.numel()):
                unit = [torch.zeros_like(x) for x in none]
                unit[k].view(-1)[j] = 1
                with torch.no_grad():
                    back = _tuple(node(*unit))
                for i, row in enumerate(back):
                    if rows[i] is not None and row is not None:
                        rows[i] = rows[i] + row.sum_to_size(rows[i].shape).square() * h_k.reshape(-1)[j]
        with torch.enable_grad():
            back = _tuple(node(*g))
        for i, (edge, down) in enumerate(zip(edges, back, strict=True)):
            if rows[i] is None:
                continue
            second = torch.zeros_like(rows[i]).reshape(-1)
            down = None if down is None else down.sum_to_size(rows[i].shape)  # as autograd does with what is expanded
            if down is not None and down.requires_grad:
                for j, entry in enumerate(down.reshape(-1)):
                    d = _cut(entry, edge, [e[0] for e in edges if e[0] is not None])
                    if d is not None:
                        second[j] = d.reshape(-1)[j]
            add(curvature, edge, rows[i] + second.view(rows[i].shape))
            add(grads, edge, None if down is None else down.detach())
    return [curvature[(_accumulator(probe, x), 0)] for x in inputs]


def _cut(entry: Tensor, edge: Any, children: list[Any]) -> Tensor | None:
    """The derivative of ``entry`` by what one edge brings, and not by way of other edges to the same node."""
    handles = [
        child.register_prehook(lambda grads: tuple(None if g is None else torch.zeros_like(g) for g in grads))
        for child in set(children)
        if type(child) is not AccumulateGrad
    ]
    try:
        return torch.autograd.grad(entry, GradientEdge(*edge), retain_graph=True, allow_unused=True)[0]
    finally:
        for handle in handles:
            handle.remove()


def _accumulator(root: Any, x: Tensor) -> Any:
    return next(n for n in _order(root) if type(n) is AccumulateGrad and n.variable is x)


def _order(root: Any) -> list[Any]:
    done: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for child, _ in node.next_functions:
            visit(child)
        done.append(node)

    visit(root)
    return done[::-1]


def _shape(edge: Any) -> tuple[int, ...]:
    node, k = edge
    return tuple(node.variable.shape) if type(node) is AccumulateGrad else tuple(node._input_metadata[k].shape)


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
