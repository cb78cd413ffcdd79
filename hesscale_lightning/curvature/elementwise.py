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
