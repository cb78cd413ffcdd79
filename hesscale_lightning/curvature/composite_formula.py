"""The formula of a composite: from its members' derivatives to the curvature of its sources.

The derivatives of the meeting point by each source are carried forward through the members, ``F' = sum_i f_i u_i'``
and ``F'' = sum_i f_i u_i'' + sum_ij f_ij u_i' u_j'``, as a diagonal and products along rows (see :mod:`.rows`). Then
``h_x = F'^2 h + F'' g`` is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hesscale_lightning.curvature import rows
from hesscale_lightning.curvature.composite import Composite, Member
from hesscale_lightning.curvature.elementwise import fitted
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.values import ZERO, Value


def carry_of(composite: Composite) -> Callable[[Sequence[Operation], Value, Value], list[Value]]:
    """How a composite carries curvature: like a rule, from the members' operations, in their order, and g and h.

    Its results are in the order of ``composite.sources``, then of ``composite.shared``. The former are curvatures, the
    latter the gradients that the composite sends to its shared members.
    """
    members = composite.members
    entry_of = _entries(members)

    def carry(operations: Sequence[Operation], g: Value, h: Value) -> list[Value]:
        rowwise = composite.rowwise
        if rowwise and members[-1].flat:
            g, h = (t if t is ZERO else t.unsqueeze(-1) for t in (g, h))
        dtype = (h if g is ZERO else g).dtype
        steps = [_step(member, op, dtype, rowwise) for member, op in zip(members, operations, strict=True)]
        width = _width(members, operations) if rowwise else 1
        results = []
        for source, flat in enumerate(composite.flat_sources):
            op, i = operations[entry_of[source][0]], entry_of[source][1]
            whole = not rowwise or _whole_row(op.input_shape(i), width, flat)
            total = rows.curvature(_carried(members, steps, rows.source(whole), ~source), g, h)
            results.append(fitted(op, i, _of_source(total, op.input_shape(i), flat, rowwise)))
        for place in composite.shared:
            shape, flat = operations[place].output_shape(), members[place].flat
            whole = not rowwise or _whole_row(shape, width, flat)
            sent = ZERO
            if g is not ZERO:
                sent = rows.pulled(_carried(members, steps, rows.source(whole), place).first, g)
                if sent is not ZERO:
                    sent = (sent.squeeze(-1) if rowwise and flat else sent).sum_to_size(shape)
            results.append(sent)
        return results

    return carry


Step = Callable[[Sequence[Any]], rows.Taylor]


def _step(member: Member, op: Operation, dtype: torch.dtype, rowwise: bool) -> Step:
    """How a member carries derivatives, from those of its inputs to those of its output."""
    row = member.row
    if row is not None:
        return lambda inputs: row.apply(inputs[0])
    assert member.partials is not None
    first, second = member.partials(op)
    lift = rowwise and member.flat
    return partial(
        rows.composed,
        [_factor(f, dtype, lift) for f in first],
        {pair: _factor(f, dtype, lift) for pair, f in second.items()},
    )


def _factor(x: Value, dtype: torch.dtype, lift: bool) -> Value:
    """A derivative as the algebra takes it: no masks, whose sum would be another mask, and with a last dimension."""
    if x is None or x is ZERO:
        return None
    if rows.is_number(x):
        return float(x) if isinstance(x, (int, float)) else x
    if x.dtype is torch.bool:
        x = x.to(dtype)
    return x.unsqueeze(-1) if lift else x


def _carried(members: Sequence[Member], steps: Sequence[Step], start: rows.Taylor, begin: int) -> rows.Taylor:
    """The meeting point's derivatives by source ``s``, as ``~s``, or by the member at a place."""
    taylors: list[rows.Taylor | None] = []
    for place, (member, step) in enumerate(zip(members, steps, strict=True)):
        if place == begin:
            taylors.append(start)
            continue
        inputs = [None if e is None else start if e == begin else taylors[e] if e >= 0 else None for e in member.wiring]
        taylors.append(None if all(u is None for u in inputs) else step(inputs))
    result = taylors[-1]
    assert result is not None
    return result


def _of_source(total: Value, shape: torch.Size, flat: bool, rowwise: bool) -> Value:
    if total is ZERO or not rowwise:
        return total
    if flat:
        return total.squeeze(-1)
    if shape and total.shape[-1] < shape[-1]:  # alike for all entries of a row
        return total.expand(*total.shape[:-1], shape[-1])
    return total


def _entries(members: Sequence[Member]) -> dict[int, tuple[int, int]]:
    """For each source a member that it enters, and as which input."""
    entries: dict[int, tuple[int, int]] = {}
    for place, member in enumerate(members):
        for i, entry in enumerate(member.wiring):
            if entry is not None and entry < 0:
                entries.setdefault(~entry, (place, i))
    return entries


def _width(members: Sequence[Member], operations: Sequence[Operation]) -> int:
    """The length of the rows."""
    widths: set[int] = set()
    for member, op in zip(members, operations, strict=True):
        widths |= rows.lengths(op.output_shape(), member.flat)
        if member.row is not None:
            widths |= rows.lengths(op.input_shape(0), member.row.flat is False and not member.row.mixes)
    return max(widths, default=1)


def _whole_row(shape: torch.Size, width: int, flat: bool) -> bool:
    """Whether a tensor has an entry of its own for every place in a row."""
    return not flat and len(shape) > 0 and shape[-1] == width
