"""Identities that frameworks put into a graph: around distributed modules, and where modules have backward hooks."""

from __future__ import annotations

from torch import Tensor

from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule


@register_rule("_DDPSinkBackward", "BackwardHookFunctionBackward", multi_output=True)
def identity(op: Operation) -> Formula:
    """The identity around a module's inputs or outputs; what comes before these is the framework's own."""
    own = len(op.needs) - len(op.node._input_metadata)

    def formula(h: tuple[Tensor | None, ...]) -> Diagonals:
        return (*[None] * own, *h)

    return formula
