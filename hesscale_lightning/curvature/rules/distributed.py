"""Identities that frameworks put into a graph: around distributed modules, and where modules have backward hooks."""

from __future__ import annotations

from collections.abc import Sequence

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value


@register_rule(
    "_DDPSinkBackward", "BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward", multi_output=True
)
def identity(op: Operation, h: Sequence[Value]) -> Sequence[Value]:
    """The identity around a module's inputs or outputs; what comes before these is the framework's own."""
    return (*[ZERO] * (len(op.needs) - op.outputs()), *h)
