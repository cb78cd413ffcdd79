"""Formulas of single operations for curvature in two parts, ``c g g^T`` in every sample and a diagonal remainder d.

An input of which every sample has rows of its own takes on the remainder by the ordinary rule, and c with it. What all
samples share, above all a parameter, takes the whole ``d + c g^2`` by the ordinary rule; that is exact where a sample
uses it once, because the square of the sample's gradient ``g_o a_i`` is a product as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.plan import Carry, Step
from hesscale_lightning.curvature.rank_one import per_sample
from hesscale_lightning.curvature.rank_one.parts import RankOne, SoftmaxHead, of_diagonal, without
from hesscale_lightning.curvature.rank_one.per_sample import by_sample
from hesscale_lightning.curvature.values import ZERO, Value


class Use(NamedTuple):
    """How a step meets the rank-one part; parts and softmaxes are numbers, because a recipe serves many graphs.

    Attributes:
        kind: Which formula of this module the step takes.
        kept: For each input, whether it takes the remainder, and not the whole.
        part: The rank-one part at the output; None: none yet.
        inners: For each output, how many neighbours belong to a sample.
        made: The part that this step splits off the remainder first, or None.
        head: The softmax that this step is, or that the remainder at its output comes from directly; or None.
        several: Whether a sample uses the weight several times, and gradients of single samples are taken for it.
    """

    kind: Literal["any", "convolution", "linear", "softmax", "picked softmax"]
    kept: list[bool]
    part: int | None
    inners: list[int]
    made: int | None = None
    head: int | None = None
    several: bool = False


class Met(NamedTuple):
    """A :class:`Use` in one graph, with that graph's parts and softmax."""

    kept: list[bool]
    part: RankOne | None
    inners: list[int]
    made: RankOne | None
    head: SoftmaxHead | None
    several: bool


class Parts:
    """The rank-one parts and softmaxes of one graph, filled as its backward goes down.

    Args:
        samples: For each part, how many samples it has.
        heads: How many softmaxes there are.
    """

    def __init__(self, samples: Sequence[int], heads: int) -> None:
        self._parts = [RankOne(count) for count in samples]
        self._heads = [SoftmaxHead() for _ in range(heads)]

    def _met(self, use: Use) -> Met:
        parts, part, made, head = self._parts, use.part, use.made, use.head
        return Met(
            use.kept,
            None if part is None else parts[part],
            use.inners,
            None if made is None else parts[made],
            None if head is None else self._heads[head],
            use.several,
        )

    def carry(self, use: Use, step: Step) -> Carry:
        """How the step carries curvature in place of the ordinary way; it takes gradient and curvature."""
        met = self._met(use)
        if use.kind == "linear":
            return lambda ops, g, h: linear(ops[0], met, g, h)
        if use.kind == "convolution":
            return lambda ops, g, h: convolution(step.carry, ops, met, g, h)
        if use.kind in ("softmax", "picked softmax"):
            return lambda ops, g, h: log_softmax(_probabilities(ops), met, use.kind == "picked softmax", g, h)
        return lambda ops, g, h: any_operation(step.carry, ops, met, g, h)


def _coefficients(met: Met, g: Value, h: Value) -> Value:
    """Settles the coefficients of the part that this step splits off, and returns them without an earlier part's."""
    made, part = met.made, met.part
    assert made is not None
    if h is ZERO:
        c = g.new_zeros(made.samples, 1)
    elif met.head is None:
        c = of_diagonal(g, h, made.samples)
    else:
        c = met.head.split(g.reshape(made.samples, -1))[0]
    made.c = c if part is None else c + part.c
    return c


# -- any operation -----------------------------------------------------------------------------------------------------


def any_operation(carry: Carry, ops: Sequence[Operation], met: Met, g: Any, h: Any) -> Sequence[Value]:
    """The ordinary formula, once for the inputs that take the remainder, once for those that take the whole."""
    kept, part, inners = met.kept, met.part, met.inners
    several = isinstance(h, tuple)
    no_gradient = all(x is ZERO for x in g) if several else g is ZERO
    if several:
        whole = h if part is None else tuple([part.whole(*y) for y in zip(g, h, inners, strict=True)])
    else:
        whole = h if part is None else part.whole(g, h, inners[0])
        if met.made is not None and not no_gradient:
            c = _coefficients(met, g, h)
            if h is not ZERO:
                h = without(h, RankOne(met.made.samples, c).diagonal(g, inners[0]))
    of_rest = _called(carry, ops, g, h, len(kept)) if any(kept) else [ZERO] * len(kept)
    if all(kept):
        return of_rest
    of_whole = _called(carry, ops, g, whole, len(kept))
    return [a if keep else b for keep, a, b in zip(kept, of_rest, of_whole, strict=True)]


def _called(carry: Carry, ops: Sequence[Operation], g: Any, h: Any, count: int) -> Sequence[Value]:
    if all(x is ZERO for x in ((*g, *h) if isinstance(h, tuple) else (g, h))):
        return [ZERO] * count
    results = carry(ops, g, h)
    if isinstance(results, (tuple, list)):
        return results
    return [results] if count == 1 else [ZERO] * count


def picks_one(op: Operation) -> bool:
    """Whether the operation picks one entry of each row."""
    shape = op.output_shape()
    return op.name == "GatherBackward0" and bool(shape) and shape[-1] == 1 and is_along_last(op)


# -- log-softmax -------------------------------------------------------------------------------------------------------


def is_along_last(op: Operation) -> bool:
    """Whether an operation works along the last dimension."""
    rank = len(op.output_shape())
    return rank > 0 and op.number("dim") % rank == rank - 1 and not any(op.transposed)


def is_log_softmax(composite: Composite, ops: Sequence[Operation]) -> bool:
    """Whether a composite is ``x - logsumexp(x, -1, keepdim=True)``."""
    return (
        [op.name for op in ops] == ["LogsumexpBackward0", "SubBackward0"]
        and [member.wiring for member in composite.members] == [[~0], [~0, 0]]
        and not composite.shared
        and bool(ops[0].number("keepdim"))
    )


def _probabilities(ops: Sequence[Operation]) -> Value:
    """The softmax, of log-softmax or of the composite that is one."""
    if len(ops) == 1:
        return ops[0].output("result").exp()
    return (ops[0].input(0, "self") - ops[0].output("result")).exp()


def log_softmax(p: Value, met: Met, picked: bool, g: Value, h: Value) -> tuple[Value]:
    """The ordinary rule, which leaves what it knows of the Hessian that is made here for the steps below.

    Args:
        p: The softmax.
        met: How the step meets the rank-one part.
        picked: Whether the loss is a function of one log-probability in each row.
        g: The gradient.
        h: The curvature.
    """
    head = met.head
    assert head is not None
    if g is ZERO:
        g = torch.zeros_like(h)
    total = g.sum(-1, keepdim=True)
    head.p, head.total = p, total
    head.others = (g - total) * p if picked else None
    head.chosen = (g * p).sum(-1, keepdim=True) if picked else None
    made = (p * p - p) * total
    if h is ZERO:
        head.passed = None
        return (made,)
    head.passed = h - 2 * (p * h) + p * p * h.sum(-1, keepdim=True)
    return (made + head.passed,)


# -- linear layers -----------------------------------------------------------------------------------------------------

_LINEAR = {"AddmmBackward0": (0, 1, 2), "MmBackward0": (None, 0, 1)}  # which inputs are bias, rows and weight


def is_linear(op: Operation) -> bool:
    """Whether the operation is ``Y = A W + b`` with a vector b that all rows share."""
    places = _LINEAR.get(op.name)
    if places is None or op.transposed[places[1]]:
        return False
    return places[0] is None or not op.needs[0] or op.input_shape(0) == op.output_shape()[1:]


def linear(op: Operation, met: Met, g: Value, h: Value) -> Sequence[Value]:
    """``Y = alpha A W + beta b``, with A's remainder ``diag(W H W^T) - c g_A^2`` where a known Hessian H is split here.

    ``diag(W H W^T)`` is ``h (W^2)^T`` for a diagonal H, and ``w (p (W^2)^T - (p W^T)^2)`` for a softmax.

    Args:
        op: The operation.
        met: How the step meets the rank-one part.
        g: The gradient.
        h: The curvature, or the remainder.
    """
    added = op.name == "AddmmBackward0"
    if added:
        a, b = op.input(1, "mat1"), op.input(2, "mat2")
        alpha, beta = op.number("alpha"), op.number("beta")
    else:
        a, b, alpha, beta = op.input(0, "self"), op.input(1, "mat2"), 1, 1
    need_a, need_b = op.needs[-2:]
    part, made, inner = met.part, met.made, met.inners[0]
    whole = h if part is None else part.whole(g, h, inner)
    h_a = h_b = h_bias = ZERO
    if need_a:
        weight = b.t() if alpha == 1 else b.t() * alpha
        if made is not None and g is not ZERO:
            h_a = _through_last_layer(met, weight, g, h)
        else:
            h_a = (h if met.kept[-2] else whole) @ (weight * weight)
    if part is not None and made is None and met.several:
        h_bias, h_b = h.sum(0), (a * a).t() @ h
        if g is not ZERO:
            rows = by_sample(g, part.samples, inner)
            h_bias = h_bias + per_sample.of_bias(part.c, rows)
            if need_b:
                inputs = by_sample(a, part.samples, inner // g.shape[1] * a.shape[1])
                h_b = h_b + per_sample.of_weight(part.c, rows, inputs).t()
    else:
        h_bias = whole.sum(0)
        h_b = (a * a).t() @ whole if need_b else ZERO
    h_b = h_b * alpha**2
    return (h_bias * beta**2, h_a, h_b) if added else (h_a, h_b)


def _through_last_layer(met: Met, weight: Value, g: Value, h: Value) -> Value:
    made, part, head = met.made, met.part, met.head
    assert made is not None
    if h is ZERO or head is None:
        c = _coefficients(met, g, h)
        if h is ZERO:
            return ZERO
        at_a = g @ weight
        return without(h @ (weight * weight), at_a * c * at_a)
    c, scale = head.split(g)
    made.c = c if part is None else c + part.c
    return head.through(weight, g, scale)


# -- convolutions ------------------------------------------------------------------------------------------------------


def is_convolution(op: Operation) -> bool:
    """Whether the operation is a convolution, of one or two dimensions, ungrouped and not transposed."""
    return (
        op.name == "ConvolutionBackward0"
        and len(op.output_shape()) in (3, 4)
        and op.number("groups") == 1
        and not op.number("transposed")
    )


def convolution(carry: Carry, ops: Sequence[Operation], met: Met, g: Value, h: Value) -> Sequence[Value]:
    """The ordinary rule for the remainder, and for kernel and bias the gradients of single samples beside it."""
    op, part = ops[0], met.part
    need_x, need_kernel, need_bias = op.needs
    assert part is not None
    if g is ZERO:
        return _called(carry, ops, ZERO, h, 3)
    if need_x and not met.kept[0]:
        return _called(carry, ops, ZERO, part.whole(g, h, met.inners[0]), 3)
    h_x, h_kernel, h_bias = [x or ZERO if x is None or x is False else x for x in _called(carry, ops, ZERO, h, 3)]
    if need_kernel:
        settings = op.number("stride"), op.number("padding"), op.number("dilation")
        kernel = tuple(op.input_shape(1))
        h_kernel = h_kernel + per_sample.of_kernel(part.c, g, op.input(0, "input"), kernel, *settings)
    if need_bias:
        h_bias = h_bias + per_sample.of_bias(part.c, g.flatten(2), -1)
    return h_x, h_kernel, h_bias
