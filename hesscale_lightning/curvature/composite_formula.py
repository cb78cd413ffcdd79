"""The formula of a composite: from its members' derivatives to the curvature of its sources.

The derivatives of the meeting point by each source are carried forward through the members, ``F' = sum_i f_i u_i'``
and ``F'' = sum_i f_i u_i'' + sum_ij f_ij u_i' u_j'``, as a diagonal and products along rows (see :mod:`.rows`). Then
``h_x = F'^2 h + F'' g`` is exact. Which products and sums that takes is worked out once, see :mod:`.straight_line`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature import rows
from hesscale_lightning.curvature.composite import Composite
from hesscale_lightning.curvature.elementwise import fit_to_input
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, Partials
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
    if composite.rowwise:
        return _along_rows(composite, operations)
    values = [member.partials(op) for member, op in zip(composite.members, operations, strict=True) if member.partials]
    carry: list[None] = [None] * len(values)
    fits = _fits(composite, operations)
    shared = [operations[place].output_shape() for place in composite.shared]
    count = len(fits)

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        inputs = _Inputs(g, h, rowwise=False)
        for value in values:
            inputs.add_partials(value(g is not None))
        program = inputs.program_of(composite, carry, 1, (), ())
        totals = program(*inputs.arguments)
        results: list[Tensor | None] = [
            fit(total) if isinstance(total, Tensor) else None  # the number 0: no curvature arrives, and none is made
            for fit, total in zip(fits, totals, strict=False)
        ]
        for sent, shape in zip(totals[count:], shared, strict=True):
            results.append(sent.sum_to_size(shape) if isinstance(sent, Tensor) else None)
        return results

    return formula


def _along_rows(composite: Composite, operations: Sequence[Operation]) -> Formula | None:
    """:func:`composite_formula` of a composite in which some member works along the last dimension."""
    members = composite.members
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
    if len(widths) > 1:
        return None
    width = max(widths, default=1)
    fits, shapes = _fits(composite, operations), _shapes(composite, operations)
    shared = {place: operations[place].output_shape() for place in composite.shared}
    whole = tuple([_whole_row(s, width, flat) for s, flat in zip(shapes, composite.flat_sources, strict=True)])
    whole_shared = tuple([_whole_row(shape, width, members[place].flat) for place, shape in shared.items()])
    end_flat = members[-1].flat

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        curved = g is not None
        if end_flat:
            g, h = (None if t is None else t.unsqueeze(-1) for t in (g, h))
        inputs = _Inputs(g, h, rowwise=True)
        for member, value in zip(members, values, strict=True):
            if member.partials is None:
                inputs.add_values(value())
            else:
                inputs.add_partials(value(curved), lift=member.flat)
        totals = inputs.program_of(composite, carry, width, whole, whole_shared)(*inputs.arguments)
        results: list[Tensor | None] = []
        for total, fit, shape, flat in zip(totals, fits, shapes, composite.flat_sources, strict=False):
            if not isinstance(total, Tensor):
                results.append(None)
                continue
            if flat:
                total = total.squeeze(-1)
            elif shape and total.shape[-1] < shape[-1]:  # alike for all entries of a row
                total = total.expand(*total.shape[:-1], shape[-1])
            results.append(fit(total))
        for sent, (place, shape) in zip(totals[len(shapes) :], shared.items(), strict=True):
            if isinstance(sent, Tensor):
                results.append((sent.squeeze(-1) if members[place].flat else sent).sum_to_size(shape))
            else:
                results.append(None)
        return results

    return formula


def _whole_row(shape: torch.Size, width: int, flat: bool) -> bool:
    """Whether a tensor has an entry of its own for every place in a row."""
    return not flat and len(shape) > 0 and shape[-1] == width


class _Inputs:
    """What a program receives at one step, and which program it takes.

    Attributes:
        arguments: g, h and every member's factors, without those that are constants.
        kinds: What the program has to know of each: an int for what it receives (the size of the last dimension, of a
            tensor that is carried along rows; inverted where it has another dtype than g and h; ``_NUMBER`` for a
            number), a string for a constant, None for what is not there.
        layout: How many factors each member has, and of which inputs.
    """

    __slots__ = ("arguments", "dtype", "kinds", "layout", "rowwise")

    def __init__(self, g: Tensor | None, h: Tensor | None, rowwise: bool) -> None:
        self.arguments: list[Any] = []
        self.kinds: list[int | str | None] = []
        self.layout: list[Any] = []
        self.dtype = (g if g is not None else h).dtype  # type: ignore[union-attr]
        self.rowwise = rowwise
        self._add((g, h))

    def add_values(self, values: Sequence[Any]) -> None:
        """What an operation along the last dimension needs."""
        self.layout.append(len(values))
        self._add(values)

    def add_partials(self, partials: Partials, lift: bool = False) -> None:
        """The derivatives of an elementwise operation; ``lift`` gives tensors the last dimension back."""
        first, second = partials
        self.layout.append((len(first), *second))
        self._add(first, lift)
        if second:
            self._add(second.values(), lift)

    def _add(self, factors: Iterable[Any], lift: bool = False) -> None:
        arguments, kinds, dtype = self.arguments, self.kinds, self.dtype
        for factor in factors:
            if isinstance(factor, Tensor):
                if factor.dtype is torch.bool:  # the sum of two masks would be another mask
                    factor = factor.to(dtype)
                if lift:
                    factor = factor.unsqueeze(-1)
                last = (factor.shape[-1] or 1) if self.rowwise and factor.dim() else 1
                kinds.append(last if factor.dtype is dtype else ~last)
                arguments.append(factor)
            elif factor is None:
                kinds.append(None)
            elif factor == 1 or factor == -1:
                kinds.append("1.0" if factor == 1 else "-1.0")
            else:
                kinds.append(_NUMBER)
                arguments.append(factor)

    def program_of(
        self,
        composite: Composite,
        carry: Sequence[Callable[..., rows.Taylor] | None],
        width: int,
        whole: tuple[bool, ...],
        whole_shared: tuple[bool, ...],
    ) -> Callable[..., list[Any]]:
        """The program for inputs of these kinds, written down when it is needed first."""
        key = (tuple(self.kinds), tuple(self.layout), width, whole, whole_shared)
        program = composite.programs.get(key)
        if program is None:
            if len(composite.programs) >= _MOST_PROGRAMS:
                composite.programs.clear()
            program = _written(composite, carry, self.layout, self.kinds, whole, whole_shared)
            composite.programs[key] = program
        return program


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

    if not composite.rowwise:  # every tensor has its own entries
        whole, whole_shared = (True,) * len(composite.sources), (True,) * len(composite.shared)
    results: list[Any] = [rows.curvature(carried(rows.source(row), ~k), g, h) for k, row in enumerate(whole)]
    for place, row in zip(composite.shared, whole_shared, strict=True):
        slope = carried(rows.source(row), place).first
        results.append(None if g is None else rows.pulled(slope, g))
    one_dtype = all(kind >= 0 for kind in kinds if isinstance(kind, int))
    return program.compiled(received, results, fuse=one_dtype)


def _applied(
    apply: Callable[..., rows.Taylor], values: Sequence[Symbol], inputs: Sequence[rows.Taylor | None]
) -> rows.Taylor:
    return apply(inputs[0], *values)


def _fits(composite: Composite, operations: Sequence[Operation]) -> list[Callable[[Tensor], Tensor]]:
    """For each source, what brings a curvature to its shape and dtype."""
    fits: dict[int, Callable[[Tensor], Tensor]] = {}
    for member, op in zip(composite.members, operations, strict=True):
        for i, entry in enumerate(member.wiring):
            if entry is not None and entry < 0 and ~entry not in fits:
                fits[~entry] = fit_to_input(op, i)
    return [fits[source] for source in range(len(composite.sources))]


def _shapes(composite: Composite, operations: Sequence[Operation]) -> list[torch.Size]:
    """The shape of each source."""
    shapes: dict[int, torch.Size] = {}
    for member, op in zip(composite.members, operations, strict=True):
        for i, entry in enumerate(member.wiring):
            if entry is not None and entry < 0:
                shapes[~entry] = op.input_shape(i)
    return [shapes[source] for source in range(len(composite.sources))]
