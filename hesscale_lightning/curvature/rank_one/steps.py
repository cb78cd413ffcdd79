"""Formulas of single operations for curvature in two parts, ``c g g^T`` in every sample and a diagonal remainder d.

An input of which every sample has rows of its own takes on the remainder by the ordinary rule, and c with it. What all
samples share, above all a parameter, takes the whole ``d + c g^2`` by the ordinary rule; that is exact where a sample
uses it once, because the square of the sample's gradient ``g_o a_i`` is a product as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.rank_one.parts import RankOne, SoftmaxHead, of_diagonal, of_softmax, without
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation


class Use(NamedTuple):
    """How a step meets the rank-one part.

    Attributes:
        kept: For each input, whether it takes the remainder, and not the whole.
        part: The rank-one part at the output; None: none yet.
        inners: For each output, how many neighbours belong to a sample.
        made: The part that this step splits off the remainder first, or None.
        head: The softmax that the remainder at the output comes from directly, or None.
    """

    kept: list[bool]
    part: RankOne | None
    inners: list[int]
    made: RankOne | None = None
    head: SoftmaxHead | None = None


def _coefficients(use: Use, g: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Settles the coefficients of the part that this step splits off.

    Returns:
        What is split off here, apart from an earlier part's coefficients; and, for a softmax, the same over its weight.
    """
    made, part = use.made, use.part
    assert made is not None
    share = None
    if h is None:
        c = g.new_zeros(made.samples, 1)
    elif use.head is None:
        c = of_diagonal(g, h, made.samples)
    else:
        w = use.head.w.reshape(*g.shape[:-1], 1)
        share = of_softmax(g, use.head.p.reshape(g.shape), w)
        c = (share * w).reshape(made.samples, 1)
    made.c = c if part is None else c + part.c
    return c, share


def any_operation(formula: Formula, curved: bool, use: Use) -> Formula:
    """The ordinary formula, once for the inputs that take the remainder, once for those that take the whole.

    Args:
        formula: The ordinary one.
        curved: Whether it takes the gradient.
        use: How the step meets the rank-one part.
    """
    call: Callable[[Any, Any], Any] = formula if curved else lambda _, h: None if h is None else formula(h)
    kept, part, inners = use.kept, use.part, use.inners
    nothing = (None,) * len(kept)

    def passed(g: Any, h: Any) -> Diagonals:
        if isinstance(g, tuple) or isinstance(h, tuple) or len(inners) > 1:
            whole = _whole_of_all(use, g, h)
        else:
            whole = h if part is None or g is None else part.whole(g, h, inners[0])
            if use.made is not None and g is not None:
                c, _ = _coefficients(use, g, h)
                c = c.view(-1, *[1] * (g.dim() - 1)) if len(c) == len(g) else c.expand(-1, inners[0]).reshape(g.shape)
                h = None if h is None else without(h, (g * c).mul_(g))
        of_rest: Diagonals = (call(g, h) or nothing) if any(kept) and not (g is None and h is None) else nothing
        if all(kept):
            return of_rest
        of_whole: Diagonals = call(g, whole) or nothing
        return [a if keep else b for keep, a, b in zip(kept, of_rest, of_whole, strict=True)]

    return passed


def _whole_of_all(use: Use, g: Any, h: Any) -> Any:
    part = use.part
    if part is None or g is None:
        return h
    h = (None,) * len(g) if h is None else h
    return tuple([part.whole(*both) for both in zip(g, h, use.inners, strict=True)])


def log_softmax(result: Tensor, dim: int, head: SoftmaxHead) -> Formula:
    """The ordinary rule where no curvature arrives, which leaves what it knows of the Hessian in ``head``."""

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        assert g is not None
        p = full(result).exp()
        w = g.sum(dim, keepdim=True).neg_()
        head.p, head.w = p, w
        return (torch.addcmul(p, p, p, value=-1).mul_(w),)

    return formula


# -- linear layers -----------------------------------------------------------------------------------------------------

_LINEAR = {"AddmmBackward0": (0, 1, 2), "MmBackward0": (None, 0, 1)}  # which inputs are bias, rows and weight


def is_linear(op: Operation) -> bool:
    """Whether the operation is ``Y = A W + b``, without factors, and b a vector that all rows share."""
    places = _LINEAR.get(op.node.name())
    if places is None:
        return False
    if places[0] is None:
        return True
    node = op.node
    return bool(
        node._saved_alpha == 1
        and node._saved_beta == 1
        and (not op.needs[0] or op.input_shape(0) == op.output_shape()[1:])
    )


def linear(op: Operation, use: Use) -> Formula:
    """``Y = A W + b``, with A's remainder ``diag(W H W^T) - c g_A^2`` where this step splits a known Hessian H.

    ``diag(W H W^T)`` is ``h (W^2)^T`` for a diagonal H, and ``w (p (W^2)^T - (p W^T)^2)`` for a softmax.
    """
    name = op.node.name()
    bias, rows, weight = _LINEAR[name]
    a = op.node._saved_mat1 if name == "AddmmBackward0" else op.node._saved_self
    b = op.node._saved_mat2
    need_bias = bias is not None and op.needs[bias]
    need_a, need_b = op.needs[rows], op.needs[weight]
    keep_a = use.kept[rows]
    transposed = op.transposed[weight]
    op.transposed[weight] = False
    part, inner = use.part, use.inners[0]

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        whole = h if part is None else part.whole(g, h, inner)
        h_a = h_b = h_bias = None
        if whole is not None:
            if need_bias:
                h_bias = whole.sum(0)
            if need_b:
                square = squared(a)
                h_b = whole.t().mm(square) if transposed else square.t().mm(whole)
        if need_a:
            if use.made is not None and g is not None:
                h_a = _through_last_layer(use, full(b), g, h)
            else:
                source = h if keep_a else whole
                h_a = None if source is None else source.mm(squared(b).t())
        return (h_a, h_b) if bias is None else (h_bias, h_a, h_b)

    return formula


def _through_last_layer(use: Use, b: Tensor, g: Tensor, h: Tensor | None) -> Tensor | None:
    c, share = _coefficients(use, g, h)
    if h is None:
        return None
    w_t = b.t()
    at_a = g.mm(w_t)
    if share is None or use.head is None:
        return without(h.mm(w_t * w_t), (at_a * c).mul_(at_a))
    p, w = use.head.p.view_as(g), use.head.w.reshape(-1, 1)
    mean = p.mm(w_t)
    return p.mm(w_t * w_t).addcmul_(mean, mean, value=-1).addcmul_(at_a * share, at_a, value=-1).clamp_(min=0).mul_(w)
