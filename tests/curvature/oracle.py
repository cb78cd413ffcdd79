"""One table format for all rules, and what a case runs: the engine against dense derivatives."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature import attach, engine, exact_local_diag, register_rule
from hesscale_lightning.curvature.compiled import CompiledPass
from hesscale_lightning.curvature.graph import trace
from hesscale_lightning.curvature.interpreted import InterpretedPass
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.values import ZERO


@dataclass(frozen=True)
class Case:
    """One use of an operation.

    Attributes:
        name: What pytest prints.
        operation: The function, of tensors only; returns a tensor or several.
        inputs: Shapes (filled with normal numbers) or ready float64 tensors.
        nodes: Names of the autograd nodes whose rules this case proves; checked to be in its graph.
        positive: Inputs are made positive (for logarithms and roots).
        reference: The same function of twice differentiable operations, where torch's own is not.
        at_loss: A composition that is exact directly at a loss only, that is, while no curvature arrives from above.
    """

    name: str
    operation: Callable[..., Any]
    inputs: Sequence[Any]
    nodes: Sequence[str] = field(default=())
    positive: bool = False
    reference: Callable[..., Any] | None = None
    at_loss: bool = False

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = []
        for spec in self.inputs:
            if isinstance(spec, Tensor):
                made.append(spec.clone())
            else:
                x = torch.randn(spec, generator=generator, dtype=torch.float64)
                made.append(x.abs() + 0.3 if self.positive else x)
        return [x.requires_grad_() for x in made]


class Probe(torch.autograd.Function):
    """Ends a graph: a scalar whose gradient with respect to each tensor is ``g`` and whose curvature is ``h``."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.g, ctx.h = tensors[count : 2 * count], tensors[2 * count :]
        ctx.count = count
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, *ctx.g, *([None] * (2 * ctx.count)))


@register_rule("ProbeBackward", prepare=lambda op: [bool(h.any()) for h in op.node.h])
def probe(op: Operation, g: Any, h: Any) -> Any:
    """What was given to the probe; nothing where that is zero, as directly below a loss."""
    count = op.number("count")
    return (*[t if there else ZERO for t, there in zip(op.tensors("h"), op.prepared, strict=True)], *[None] * 2 * count)


def with_constants(cases: Sequence[Case]) -> list[Case]:
    """Each case of several inputs, with every choice of some of them as constants, which torch often does not save."""
    made: list[Case] = []
    for case in cases:
        indices = range(len(case.inputs))
        for count in range(1, len(case.inputs)):
            made.extend(_with_constants(case, kept) for kept in itertools.combinations(indices, count))
    return made


def _with_constants(case: Case, kept: Sequence[int]) -> Case:
    def closed(function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*tensors: Tensor) -> Any:
            inputs = [x.detach().to(tensors[0].dtype) for x in case.tensors()]
            for k, x in zip(kept, tensors, strict=True):
                inputs[k] = x
            return function(*inputs)

        return operation

    return dataclasses.replace(
        case,
        name=f"{case.name} by {' and '.join(map(str, kept))}",
        operation=closed(case.operation),
        inputs=[case.tensors()[k].detach() for k in kept],
        nodes=(),  # some are there only for the others
        reference=closed(case.reference) if case.reference else None,
    )


def node_names(loss: Tensor) -> set[str]:
    found = trace(loss.grad_fn, None)
    names = {node.name() for node in found.nodes}
    if any(transposed for edges in found.edges.values() for _, _, transposed in edges):
        names.add("TBackward0")
    return names


def check(case: Case, dtype: torch.dtype = torch.float64) -> None:
    """Compares the engine with the dense local formula, relative error below 1e-9.

    Four times: curvature and gradient arrive; only the gradient does, as directly at the loss; only curvature does,
    because the gradient is zero, and because Gauss-Newton drops the second derivative.
    """
    for with_g, with_h, method in ((1, 1, "hesscale"), (1, 0, "hesscale"), (0, 1, "hesscale"), (1, 1, "hesscale_gn")):
        if case.at_loss and with_h:
            continue
        _check(case, dtype, bool(with_g), bool(with_h), method)


def _check(case: Case, dtype: torch.dtype, with_g: bool, with_h: bool, method: Any) -> None:
    """Three times: by the rules, while they are written down, and by the program."""
    engine._structures.clear()
    for kind, patience in ((InterpretedPass, 0), (InterpretedPass, 4), (CompiledPass, 4)):
        engine._structures.patience = patience
        inputs = [x.detach().to(dtype).requires_grad_() for x in case.tensors()]
        outputs = case.operation(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(2)
        g = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) * with_g for y in outputs]
        h = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) * with_h for y in outputs]
        if method == "hesscale_gn":  # a parameterised operation on the way makes the case's a part of the inside
            one = torch.ones((), dtype=dtype, requires_grad=True)
            loss = Probe.apply(len(outputs), *[y * one for y in outputs], *g, *h)
        else:
            loss = Probe.apply(len(outputs), *outputs, *g, *h)
        missing = set(case.nodes) - node_names(loss)
        assert not missing, f"{case.name} was to prove {missing}, but its graph has {sorted(node_names(loss))}"
        attachment = attach(loss, method=method)
        assert isinstance(attachment, kind), f"{case.name}: no program was written"
        loss.backward()
        if method == "hesscale_gn":
            g = [torch.zeros_like(g_y) for g_y in g]
        expected = exact_local_diag(case.reference or case.operation, inputs, g, h)
        scale = max(float(e.abs().max()) if e.numel() else 0.0 for e in expected)
        tolerance = 1e-9 if dtype is torch.float64 else 1e-4
        for x, e in zip(inputs, expected, strict=True):
            assert x.hess_diag.shape == e.shape
            assert x.hess_diag.dtype == dtype
            error = float((x.hess_diag - e).abs().max()) if e.numel() else 0.0
            assert error <= tolerance * max(scale, 1e-6), (
                f"{case.name} ({kind.__name__}, {method}, g {with_g}, h {with_h}): error {error:.3e} at {scale:.3e}"
            )
