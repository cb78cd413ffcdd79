"""Formulas of single operations for curvature in two parts, ``c g g^T`` in every sample and a diagonal remainder d.

An input of which every sample has rows of its own takes on the remainder by the ordinary rule, and c with it. What all
samples share, above all a parameter, takes the whole ``d + c g^2`` by the ordinary rule; that is exact where a sample
uses it once, because the square of the sample's gradient ``g_o a_i`` is a product as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.rank_one import per_sample
from hesscale_lightning.curvature.rank_one.parts import RankOne, SoftmaxHead, of_diagonal, without
from hesscale_lightning.curvature.rank_one.per_sample import by_sample
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, Rule
from hesscale_lightning.curvature.rules.shape import signed

_convolution_backward = torch.ops.aten.convolution_backward.default


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

    def formula(self, use: Use, op: Operation, rule: Rule) -> Formula:
        """The formula of an operation in place of the ordinary one; it takes gradient and curvature."""
        met = self._met(use)
        if use.kind == "linear":
            return linear(op, rule.name == "AddmmBackward0", met)
        if use.kind == "convolution":
            return convolution(op, met)
        if use.kind in ("softmax", "picked softmax"):
            result = op.node._saved_result
            return log_softmax(lambda: full(result).exp(), met, use.kind == "picked softmax")
        return any_operation(rule.build(op), op.curved, met)

    def of_composite(self, use: Use, formula: Formula, operations: Sequence[Operation]) -> Formula:
        """The formula of a composite in place of the ordinary one."""
        met = self._met(use)
        if use.kind in ("softmax", "picked softmax"):
            node = operations[0].node
            x, total = node._saved_self, node._saved_result
            return log_softmax(lambda: torch.exp(full(x) - full(total)), met, use.kind == "picked softmax")
        return any_operation(formula, True, met)


def _coefficients(met: Met, g: Tensor, h: Tensor | None) -> Tensor:
    """Settles the coefficients of the part that this step splits off, and returns them without an earlier part's."""
    made, part = met.made, met.part
    assert made is not None
    if h is None:
        c = g.new_zeros(made.samples, 1)
    elif met.head is None:
        c = of_diagonal(g, h, made.samples)
    else:
        c = met.head.split(g.reshape(made.samples, -1))[0]
    made.c = c if part is None else c + part.c
    return c


# -- any operation -----------------------------------------------------------------------------------------------------


def any_operation(formula: Formula, curved: bool, met: Met) -> Formula:
    """The ordinary formula, once for the inputs that take the remainder, once for those that take the whole.

    Args:
        formula: The ordinary one.
        curved: Whether it takes the gradient.
        met: How the step meets the rank-one part.
    """
    call: Callable[[Any, Any], Any] = formula if curved else lambda _, h: None if h is None else formula(h)
    kept, part, inners = met.kept, met.part, met.inners
    nothing = (None,) * len(kept)

    def passed(g: Any, h: Any) -> Diagonals:
        if len(inners) > 1:
            whole = h if part is None or g is None else _whole_of_all(part, g, h, inners)
        else:
            whole = h if part is None or g is None else part.whole(g, h, inners[0])
            if met.made is not None and g is not None:
                c = _coefficients(met, g, h)
                h = None if h is None else without(h, RankOne(met.made.samples, c).diagonal(g, inners[0]))
        of_rest: Diagonals = (call(g, h) or nothing) if any(kept) and not (g is None and h is None) else nothing
        if all(kept):
            return of_rest
        of_whole: Diagonals = call(g, whole) or nothing
        return [a if keep else b for keep, a, b in zip(kept, of_rest, of_whole, strict=True)]

    return passed


def _whole_of_all(part: RankOne, g: Any, h: Any, inners: list[int]) -> Any:
    h = (None,) * len(g) if h is None else h
    return tuple([part.whole(g_y, h_y, inner) for g_y, h_y, inner in zip(g, h, inners, strict=True)])


def picks_one(op: Operation) -> bool:
    """Whether the operation picks one entry of each row."""
    shape = op.output_shape()
    return op.node.name() == "GatherBackward0" and bool(shape) and shape[-1] == 1 and is_along_last(op)


# -- log-softmax -------------------------------------------------------------------------------------------------------


def is_along_last(op: Operation) -> bool:
    """Whether an operation works along the last dimension."""
    rank = len(op.output_shape())
    return rank > 0 and signed(op.node._saved_dim) % rank == rank - 1 and not any(op.transposed)


def is_log_softmax(composite: Composite, nodes: Sequence[Node]) -> bool:
    """Whether a composite is ``x - logsumexp(x, -1, keepdim=True)``."""
    return (
        [node.name() for node in nodes] == ["LogsumexpBackward0", "SubBackward0"]
        and [member.wiring for member in composite.members] == [[~0], [~0, 0]]
        and not composite.shared
        and bool(nodes[0]._saved_keepdim)
    )


def log_softmax(probabilities: Callable[[], Tensor], met: Met, picked: bool) -> Formula:
    """The ordinary rule, which leaves what it knows of the Hessian that is made here for the steps below.

    Args:
        probabilities: Returns the softmax.
        met: How the step meets the rank-one part.
        picked: Whether the loss is a function of one log-probability in each row.
    """
    head = met.head
    assert head is not None

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        if g is None:
            g = torch.zeros_like(h)  # type: ignore[arg-type]
        p = probabilities()
        total = g.sum(-1, True)
        head.p, head.total = p, total
        head.others = (g - total).mul_(p) if picked else None
        head.chosen = (g * p).sum(-1, True) if picked else None
        made = torch.addcmul(p, p, p, value=-1).mul_(total).neg_()
        if h is None:
            head.passed = None
            return (made,)
        head.passed = torch.addcmul(h, p, h, value=-2).addcmul_(p * p, h.sum(-1, keepdim=True))
        return (made.add_(head.passed),)

    return formula


# -- linear layers -----------------------------------------------------------------------------------------------------

_LINEAR = {"AddmmBackward0": (0, 1, 2), "MmBackward0": (None, 0, 1)}  # which inputs are bias, rows and weight


def is_linear(op: Operation) -> bool:
    """Whether the operation is ``Y = A W + b`` with a vector b that all rows share."""
    places = _LINEAR.get(op.node.name())
    if places is None or op.transposed[places[1]]:
        return False
    return places[0] is None or not op.needs[0] or op.input_shape(0) == op.output_shape()[1:]


def linear(op: Operation, added: bool, met: Met) -> Formula:
    """``Y = alpha A W + beta b``, with A's remainder ``diag(W H W^T) - c g_A^2`` where a known Hessian H is split here.

    ``diag(W H W^T)`` is ``h (W^2)^T`` for a diagonal H, and ``w (p (W^2)^T - (p W^T)^2)`` for a softmax.

    Args:
        op: The operation.
        added: Whether there is a ``b``.
        met: How the step meets the rank-one part.
    """
    node, alpha, beta = op.node, 1, 1
    if added:
        a, b, (need_bias, need_a, need_b) = node._saved_mat1, node._saved_mat2, op.needs
        alpha, beta = node._saved_alpha, node._saved_beta
    else:
        a, b, (need_a, need_b) = node._saved_self, node._saved_mat2, op.needs
        need_bias = False
    keep_a = met.kept[-2]
    transposed = op.transposed[-1]
    op.transposed[-1] = False
    part, made, inner = met.part, met.made, met.inners[0]
    if part is not None and made is None and met.several:
        return _linear_of_several(a, b, alpha, beta, op.needs, transposed, met)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        whole = h if part is None or g is None else part.whole(g, h, inner)
        h_a = h_b = h_bias = None
        if need_a:
            weight = full(b).t()
            if alpha != 1:
                weight = weight * alpha
            if made is not None and g is not None:
                h_a = _through_last_layer(met, weight, g, h)
            else:
                source = h if keep_a else whole
                h_a = None if source is None else source.mm(weight * weight)
        if whole is not None:
            if need_bias:
                h_bias = whole.sum(0) if beta == 1 else whole.sum(0) * beta**2
            if need_b:
                square = squared(a)
                h_b = whole.t().mm(square) if transposed else square.t().mm(whole)
                if alpha != 1:
                    h_b = h_b * alpha**2
        return (h_bias, h_a, h_b) if added else (h_a, h_b)

    return formula


def _linear_of_several(
    a: Tensor, b: Tensor, alpha: float, beta: float, needs: Sequence[bool], transposed: bool, met: Met
) -> Formula:
    """:func:`linear` where a sample has several rows, as in a sequence."""
    part, keep_a = met.part, met.kept[-2]
    assert part is not None
    need_a, need_b = needs[-2:]

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        h_a = h_b = h_bias = None
        if need_a:
            source = h if keep_a or g is None else part.whole(g, h, met.inners[0])
            h_a = None if source is None else source.mm((full(b).t() * alpha).square_())
        if h is not None:
            h_bias, h_b = h.sum(0), h.t().mm(squared(a))
        if g is not None:
            rows = by_sample(g, part.samples, met.inners[0])
            inputs = by_sample(a, part.samples, met.inners[0] // g.shape[1] * a.shape[1])
            of_bias = per_sample.of_bias(part.c, rows)
            h_bias = of_bias if h_bias is None else h_bias.add_(of_bias)
            if need_b:
                of_weight = per_sample.of_weight(part.c, rows, inputs)
                h_b = of_weight if h_b is None else h_b.add_(of_weight)
        if h_b is not None:
            h_b = h_b * alpha**2 if alpha != 1 else h_b
            h_b = h_b if transposed else h_b.t()
        if len(needs) == 2:
            return h_a, h_b
        return (h_bias if h_bias is None or beta == 1 else h_bias * beta**2) if needs[0] else None, h_a, h_b

    return formula


def _through_last_layer(met: Met, weight: Tensor, g: Tensor, h: Tensor | None) -> Tensor | None:
    made, part, head = met.made, met.part, met.head
    assert made is not None
    if h is None or head is None:
        c = _coefficients(met, g, h)
        if h is None:
            return None
        at_a = g.mm(weight)
        return without(h.mm(weight * weight), (at_a * c).mul_(at_a))
    c, scale = head.split(g)
    made.c = c if part is None else c + part.c
    return head.through(weight, g, scale)


# -- convolutions ------------------------------------------------------------------------------------------------------


def is_convolution(op: Operation) -> bool:
    """Whether the operation is a convolution, of one or two dimensions, ungrouped and not transposed."""
    node = op.node
    return (
        node.name() == "ConvolutionBackward0"
        and len(op.output_shape()) in (3, 4)
        and node._saved_groups == 1
        and not node._saved_transposed
    )


def of_operands(op: Operation, x: Tensor, w: Tensor, *settings: object) -> Formula:
    """The formula for input x and kernel w; ``settings`` are what the convolution's own backward takes after them."""
    needs = list(op.needs)
    need_x, need_w, _ = needs

    def formula(h: Tensor) -> Diagonals:
        # Where a diagonal is not needed, the other operand only lends its shape.
        x_squared = squared(x) if need_w else x.to(h.dtype)
        w_squared = squared(w) if need_x else w.to(h.dtype)
        diagonals: Diagonals = _convolution_backward(h, x_squared, w_squared, *settings, needs)
        return diagonals

    return formula


def convolution(op: Operation, met: Met) -> Formula:
    """The ordinary rule for the remainder, and for kernel and bias the gradients of single samples beside it."""
    node, part = op.node, met.part
    x, w = node._saved_input, node._saved_weight
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    ordinary = of_operands(
        op, x, w, node._saved_bias_sym_sizes_opt, stride, padding, dilation, False, node._saved_output_padding, 1
    )
    kernel, settings = tuple(w.shape), (stride, padding, dilation)
    need_x, need_kernel, need_bias = op.needs
    keep_x = met.kept[0]
    assert part is not None

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        if g is None:
            return ordinary(h)
        if need_x and not keep_x:
            return ordinary(part.whole(g, h, met.inners[0]))
        h_x, h_kernel, h_bias = (None, None, None) if h is None else ordinary(h)
        if need_kernel:
            of_kernel = per_sample.of_kernel(part.c, g, x, kernel, *settings)
            h_kernel = of_kernel if h_kernel is None else h_kernel.add_(of_kernel)
        if need_bias:
            of_bias = per_sample.of_bias(part.c, g.flatten(2).mT)
            h_bias = of_bias if h_bias is None else h_bias.add_(of_bias)
        return h_x, h_kernel, h_bias

    return formula
