"""Elementwise operations: one description of their derivatives, used alone or joined with their neighbours.

An elementwise operation ``y = f(x_1, ..., x_n)`` (with broadcasting) is described by its *partials*, the first and
second derivatives by its inputs. Alone, its rule is ``h_i = f_i^2 h + f_ii g``, summed to the input's shape. Where
paths from one tensor meet again in such an operation, as in ``x * sigmoid(x)``, it is joined with others: see
:mod:`.composite`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.values import ZERO, Value

#: First derivatives by each input (None: not known, because that input needs none) and second derivatives by pairs.
Partials = tuple[Sequence[Any], Mapping[tuple[int, int], Any]]
PartialsRule = Callable[[Operation], Partials]


def partials_of(rule: Callable[[Operation], Any]) -> PartialsRule:
    """A rule of an elementwise operation in the form for several inputs; for one it may return ``f', f''``."""

    def partials(op: Operation) -> Partials:
        first, second = rule(op)
        if isinstance(second, Mapping):
            return first, second
        return (first,), {} if second is None else {(0, 0): second}

    return partials


def alone(rule: PartialsRule) -> Callable[[Operation, Value, Value], list[Value]]:
    """The rule of an elementwise operation that is not joined with others."""

    def carry(op: Operation, g: Value, h: Value) -> list[Value]:
        first, second = rule(op)
        if len(op.needs) == 1:
            return [local_rule(first[0], second.get((0, 0)), g, h)]
        return [
            fitted(op, i, local_rule(first[i], second.get((i, i)), g, h)) if op.need(i) else ZERO
            for i in range(len(op.needs))
        ]

    return carry


def local_rule(first: Value, second: Value, g: Value, h: Value) -> Value:
    """``first^2 h + second g``, either of which may be missing."""
    passed = ZERO if first is None or h is ZERO else _squared_times(first, h)
    return passed if second is None else passed + g * second


def _squared_times(first: Value, h: Value) -> Value:
    if isinstance(first, (int, float)):
        return h if first * first == 1 else ZERO if first == 0 else h * (first * first)
    if getattr(first, "dtype", None) is torch.bool:
        return h.where(first, 0.0)
    return h * first * first


def fitted(op: Operation, i: int, x: Value) -> Value:
    """A curvature of the output's shape and dtype, brought to those of input ``i``."""
    if x is ZERO:
        return x
    shape, dtype = op.input_shape(i), op.input_dtype(i)
    if x.shape != shape:
        x = x.sum_to_size(shape)
    return x if x.dtype is dtype else x.to(dtype)


# -- TRANSITION: the old form, until every family has moved ---------------------------------------------------------

Factor = Tensor | float


def elementwise(
    *names: str, curved: bool = True, formula: Callable[[Operation], Any] | None = None, reduces: bool = False
) -> Callable[[Any], Any]:
    """Registers an elementwise operation by its partials.

    The decorated function receives an :class:`Operation` at attach time and returns a function of one flag, whether
    second derivatives are wanted, that returns ``(first, second)``: the derivative by each input, and those by pairs
    of inputs
    ``{(i, j): f_ij}`` with ``i <= j``; a pair left out is zero.

    Args:
        names: Names of autograd nodes.
        curved: Whether any input's own second derivative ``f_ii`` can differ from zero.
        formula: A faster rule for the operation standing alone, where one is worth having.
        reduces: Whether the entries may also be summed, as by a loss, so that a composite may end in the operation but
            not pass it. The sum's factors belong to the partials.
    """

    def register(partials: Any) -> Any:
        build = formula or (lambda op: _alone(op, partials))
        from hesscale_lightning.curvature.registry import register_rule

        register_rule(*names, curved=curved, partials=partials, reduces=reduces)(build)
        return partials

    return register


def _alone(op: Operation, partials_rule: Any) -> Any:
    partials = partials_rule(op)
    inputs = [i for i, need in enumerate(op.needs) if need]
    count = len(op.needs)
    fits = {i: fit_to_input(op, i) for i in inputs} if count > 1 else None

    def curve(g: Tensor | None, h: Tensor | None) -> Any:
        first, second = partials(g is not None)
        results: list[Tensor | None] = [None] * count
        for i in inputs:
            result = old_local_rule(first[i], second.get((i, i)), g, h)
            results[i] = result if fits is None or result is None else fits[i](result)
        return results

    return curve if op.curved else lambda h: curve(None, h)


def old_local_rule(first: Factor | None, second: Factor | None, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """``first^2 h + second g``."""
    result = None
    if h is not None and first is not None:
        if not isinstance(first, Tensor):
            result = h * (first * first)
        elif first.dtype is torch.bool:
            result = h.where(first, 0.0)
        else:
            result = (h * first).mul_(first)
    if g is not None and second is not None:
        term = g * second
        result = term if result is None else result.add_(term)
    return result


def fit_to_input(op: Operation, i: int) -> Callable[[Tensor], Tensor]:
    """Brings a curvature of the output's shape and dtype to those of input ``i``."""
    shape = op.input_shape(i)
    dtype, _ = op.input_meta(i)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32

    def fit(x: Tensor) -> Tensor:
        if x.shape != shape:
            x = x.sum_to_size(shape)
        return x if x.dtype is dtype else x.to(dtype)

    return fit
