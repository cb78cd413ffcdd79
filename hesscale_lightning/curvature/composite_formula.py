"""The formula of a composite: from its members' derivatives to the curvature of its sources.

The derivatives of the meeting point by each source are carried forward through the members, ``F' = sum_i f_i u_i'``
and ``F'' = sum_i f_i u_i'' + sum_ij f_ij u_i' u_j'``, as a diagonal and products along rows (see :mod:`.rows`). Then
``h_x = F'^2 h + F'' g`` is exact. Which products and sums that takes is worked out once, see :mod:`.straight_line`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature import rows
from hesscale_lightning.curvature.composite import Composite, Member
from hesscale_lightning.curvature.elementwise import fit_to_input
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation
from hesscale_lightning.curvature.straight_line import Program, Symbol

_MOST_PROGRAMS = 16  # of one composite; structures repeat from step to step
_NUMBER = 0  # the kind of a number that may differ from step to step


def composite_formula(composite: Composite, operations: Sequence[Operation]) -> Formula | None:
    """The formula of a composite; its results are in the order of ``composite.sources``, then of ``composite.shared``.

    The former are curvatures, the latter the gradients that the composite sends to its shared members.

    Args:
        composite: What to join.
        operations: The members' operations, in their order.

    Returns:
        None if an operation is no longer along the last dimension, which a plan cannot know.
    """
    members, rowwise = composite.members, composite.rowwise
    values: list[Callable[..., Any]] = []
    carry: list[Callable[..., rows.Taylor] | None] = []  # None: by partials
    widths: set[int] = set()
    for member, op in zip(members, operations, strict=True):
        widths |= rows.lengths(op.output_shape(), member.flat)
        if member.partials is not None:
            values.append(member.partials(op))
            carry.append(None)
            continue
        rule = rows.find_row_rule(op.node.name())
        row = rule(op) if rule is not None else None
        if row is None or (row.flat is not None and row.flat is not member.flat):
            return None
        values.append(row.values)
        carry.append(row.apply)
        widths |= rows.lengths(op.input_shape(0), row.flat is False and not row.mixes)
    if rowwise and len(widths) > 1:
        return None
    width = max(widths, default=1)
    fits, shapes = _fits(composite, operations)
    shared = {place: operations[place].output_shape() for place in composite.shared}
    whole = [_whole_row(shape, width, flat) for shape, flat in zip(shapes, composite.flat_sources, strict=True)]
    whole_shared = [_whole_row(shape, width, members[place].flat) for place, shape in shared.items()]
    end_flat = rowwise and members[-1].flat

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        dtype = (g if g is not None else h).dtype  # type: ignore[union-attr]
        factors, layout = _factors(values, members, rowwise, g is not None, dtype)
        if end_flat:
            g, h = (None if t is None else t.unsqueeze(-1) for t in (g, h))
        kinds = tuple([_kind(f, dtype) for f in (g, h, *factors)])
        key = (kinds, layout, width)
        program = composite.programs.get(key)
        if program is None:
            if len(composite.programs) >= _MOST_PROGRAMS:
                composite.programs.clear()
            program = composite.programs[key] = _written(composite, carry, layout, kinds, whole, whole_shared)
        totals = program(*[f for f, kind in zip((g, h, *factors), kinds, strict=True) if isinstance(kind, int)])
        results: list[Tensor | None] = []
        for total, fit, shape, flat in zip(totals, fits, shapes, composite.flat_sources, strict=False):
            if not isinstance(total, Tensor):  # the number 0: no curvature arrives, and none is made
                results.append(None)
                continue
            if rowwise and flat:
                total = total.squeeze(-1)
            elif rowwise and shape and total.shape[-1] < shape[-1]:  # alike for all entries of a row
                total = total.expand(*total.shape[:-1], shape[-1])
            results.append(fit(total))
        for sent, (place, shape) in zip(totals[len(shapes) :], shared.items(), strict=True):
            if isinstance(sent, Tensor):
                results.append((sent.squeeze(-1) if rowwise and members[place].flat else sent).sum_to_size(shape))
            else:
                results.append(None)
        return results

    return formula


def _whole_row(shape: torch.Size, width: int, flat: bool) -> bool:
    """Whether a tensor has an entry of its own for every place in a row."""
    return not flat and len(shape) > 0 and shape[-1] == width


def _factors(
    values: Sequence[Callable[..., Any]], members: Sequence[Member], rowwise: bool, curved: bool, dtype: torch.dtype
) -> tuple[list[Any], tuple[Any, ...]]:
    """Every member's tensors and numbers in one list, and how they are laid out there."""
    factors: list[Any] = []
    layout: list[Any] = []
    for member, value in zip(members, values, strict=True):
        if member.partials is None:
            own: Sequence[Any] = value()
            layout.append(len(own))
        else:
            first, second = value(curved)
            own = [*first, *second.values()]
            layout.append((len(first), *second))
            # Masks as numbers: the sum of two masks would be another mask, and a number times a mask is float32.
            own = [f.to(dtype) if isinstance(f, Tensor) and f.dtype is torch.bool else f for f in own]
            if rowwise and member.flat:  # gets the last dimension back
                own = [f.unsqueeze(-1) if isinstance(f, Tensor) else f for f in own]
        factors += own
    return factors, tuple(layout)


def _kind(factor: Any, dtype: torch.dtype) -> int | str | None:
    """What a program has to know of a factor: an int for what it receives at every step, a string for a constant."""
    if isinstance(factor, Tensor):
        last = factor.shape[-1] or 1 if factor.dim() else 1
        return last if factor.dtype is dtype else ~last
    if factor is None:
        return None
    return str(float(factor)) if factor in (1, -1) else _NUMBER


def _written(
    composite: Composite,
    carry: Sequence[Callable[..., rows.Taylor] | None],
    layout: Sequence[Any],
    kinds: Sequence[int | str | None],
    whole: Sequence[bool],
    whole_shared: Sequence[bool],
) -> Callable[..., list[Any]]:
    """The program for factors of these kinds, to the sources' curvatures and the shared members' gradients."""
    program = Program()
    symbols: list[Any] = [
        program.input(max(kind, ~kind, 1), kind == _NUMBER)
        if isinstance(kind, int)
        else None
        if kind is None
        else float(kind)
        for kind in kinds
    ]
    received = sum(isinstance(symbol, Symbol) for symbol in symbols)
    g, h, *factors = symbols
    steps: list[Callable[[Any], rows.Taylor]] = []
    for apply, entry in zip(carry, layout, strict=True):
        count = entry if apply is not None else entry[0] + len(entry) - 1
        own, factors = factors[:count], factors[count:]
        if apply is not None:
            steps.append(partial(_applied, apply, own))
        else:
            steps.append(partial(rows.composed, own[: entry[0]], dict(zip(entry[1:], own[entry[0] :], strict=True))))

    def carried(start: rows.Taylor, begin: int) -> rows.Taylor:
        """The meeting point's derivatives by source ``s``, as ``~s``, or by the member at a place."""
        taylors: list[rows.Taylor | None] = []
        for place, (member, step) in enumerate(zip(composite.members, steps, strict=True)):
            if place == begin:
                taylors.append(start)
                continue
            inputs = [
                None if e is None else start if e == begin else taylors[e] if e >= 0 else None for e in member.wiring
            ]
            taylors.append(None if all(u is None for u in inputs) else step(inputs))
        result = taylors[-1]
        assert result is not None
        return result

    rowwise = composite.rowwise
    results: list[Any] = [
        rows.curvature(carried(rows.source(row or not rowwise), ~source), g, h) for source, row in enumerate(whole)
    ]
    for place, row in zip(composite.shared, whole_shared, strict=True):
        slope = carried(rows.source(row or not rowwise), place).first
        results.append(None if g is None else rows.pulled(slope, g))
    one_dtype = all(kind >= 0 for kind in kinds if isinstance(kind, int))
    return program.compiled(received, results, fuse=one_dtype)


def _applied(
    apply: Callable[..., rows.Taylor], values: Sequence[Symbol], inputs: Sequence[rows.Taylor | None]
) -> rows.Taylor:
    return apply(inputs[0], *values)


def _fits(
    composite: Composite, operations: Sequence[Operation]
) -> tuple[list[Callable[[Tensor], Tensor]], list[torch.Size]]:
    """For each source, what brings a curvature to its shape and dtype; and the shape."""
    fits: dict[int, Callable[[Tensor], Tensor]] = {}
    shapes: dict[int, torch.Size] = {}
    for member, op in zip(composite.members, operations, strict=True):
        for i, entry in enumerate(member.wiring):
            if entry is not None and entry < 0 and ~entry not in fits:
                fits[~entry] = fit_to_input(op, i)
                shapes[~entry] = op.input_shape(i)
    count = range(len(composite.sources))
    return [fits[source] for source in count], [shapes[source] for source in count]
