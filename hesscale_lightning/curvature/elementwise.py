"""Elementwise operations: one description of their derivatives, used alone or joined with their neighbours.

An elementwise operation ``y = f(x_1, ..., x_n)`` (with broadcasting) is described by its *partials*, the first and
second derivatives by its inputs. Alone, its rule is ``h_i = f_i^2 h + f_ii g``, summed to the input's shape. Where
paths from one tensor meet again in such an operation, as in ``x * sigmoid(x)``, it is joined with others: see
:mod:`.composite`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, PartialsRule, register_rule

Factor = Tensor | float


def elementwise(
    *names: str, curved: bool = True, formula: Callable[[Operation], Formula] | None = None, reduces: bool = False
) -> Callable[[PartialsRule], PartialsRule]:
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

    def register(partials: PartialsRule) -> PartialsRule:
        build = formula or (lambda op: _alone(op, partials))
        register_rule(*names, curved=curved, partials=partials, reduces=reduces)(build)
        return partials

    return register


def _alone(op: Operation, partials_rule: PartialsRule) -> Formula:
    partials = partials_rule(op)
    inputs = [i for i, need in enumerate(op.needs) if need]
    count = len(op.needs)
    fits = {i: fit_to_input(op, i) for i in inputs} if count > 1 else None

    def curve(g: Tensor | None, h: Tensor | None) -> Diagonals:
        first, second = partials(g is not None)
        results: list[Tensor | None] = [None] * count
        for i in inputs:
            result = local_rule(first[i], second.get((i, i)), g, h)
            results[i] = result if fits is None or result is None else fits[i](result)
        return results

    return curve if op.curved else lambda h: curve(None, h)


def local_rule(first: Factor | None, second: Factor | None, g: Tensor | None, h: Tensor | None) -> Tensor | None:
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
